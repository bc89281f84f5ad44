"""A stand-in for a weight tensor of a file."""

from dataclasses import dataclass

import numpy as np

from engine.gguf.types import GGMLType


@dataclass(frozen=True, eq=False)
class Weight:
    """What products ask of a weight: packed rows and their type."""

    type: GGMLType
    shape: tuple
    raw: np.ndarray
    name: str = "blk.0.test.weight"
