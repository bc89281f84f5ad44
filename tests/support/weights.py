"""A stand-in for a weight tensor of a file, and where random bytes must be no scales."""

from dataclasses import dataclass

import numpy as np

from engine.gguf.types import GGMLType

SCALES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "IQ1_M": (),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "NVFP4": (),
    "Q1_0": (0,),
    "Q2_0": (0,),
    "F16": (),
    "BF16": (),
}
"""Offsets of the float16 scales in a block of each format; every other byte may hold anything."""


@dataclass(frozen=True, eq=False)
class Weight:
    """What products ask of a weight: packed rows and their type."""

    type: GGMLType
    shape: tuple
    raw: np.ndarray
    name: str = "blk.0.test.weight"
