"""Hyper-parameters of rotary position embedding; engine/model/rope.py makes angles of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RopeStyle(Enum):
    """Which elements of a head are rotated together."""

    NORM = "norm"  # adjacent pairs (0,1), (2,3), ...
    NEOX = "neox"  # half split: (0, n/2), (1, n/2 + 1), ...


class RopeScaling(Enum):
    """How rotation frequencies are stretched beyond the trained context; the values are the names used in metadata."""

    NONE = "none"
    LINEAR = "linear"
    YARN = "yarn"
    LONGROPE = "longrope"  # divisors per frequency from the tensors rope_factors_long and rope_factors_short


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer.

    `factor` is the context stretch s (1 = none). The YaRN fields follow Peng et al. 2023 (arXiv 2309.00071):
    `extrapolation` blends interpolated and original frequencies, `attention_factor` multiplies cos and sin,
    `log_multiplier` (mscale_all_dim; 0 = absent) divides that magnitude again.
    """

    style: RopeStyle
    n_rot: int
    base: float
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0
    original_context: int = 0
    extrapolation: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    log_multiplier: float = 0.0
    long_factors: bool = False  # rope_factors_long, else rope_factors_short, where the file has them
    divided: bool = True  # rope_freqs divides the frequencies, where the file has it
