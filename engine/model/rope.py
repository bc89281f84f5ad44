"""Rotary position embedding: from its constants to frequencies, and from positions to cos and sin.

Su et al. 2021 (arXiv 2104.09864); YaRN: Peng et al. 2023 (arXiv 2309.00071). Frequencies are linear in the position for
every scaling, so one vector and one magnitude describe a whole layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.model.config import RopeConfig, RopeScaling, RopeStyle

Float64Array = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RopeTable:
    """Rotation by angle = position · inv_freq[i], cos and sin multiplied by `magnitude`.

    Attributes:
        style: which elements are paired.
        n_rot: leading elements of a head that are rotated; the rest pass through.
        inv_freq: (n_rot / 2,) float64, radians per position.
        magnitude: factor on cos and sin (1 except for YaRN).
    """

    style: RopeStyle
    n_rot: int
    inv_freq: Float64Array
    magnitude: float

    def cos_sin(self, positions: npt.NDArray[np.int32]) -> tuple[Float32Array, Float32Array]:
        """Cos and sin for positions (T,): two arrays (T, n_rot / 2) float32."""
        # The angle is formed in float64: at position 100 000 a float32 product is already off by 0.005 rad.
        angle = np.multiply.outer(positions.astype(np.float64), self.inv_freq)
        return (np.cos(angle) * self.magnitude).astype(np.float32), (np.sin(angle) * self.magnitude).astype(np.float32)


def build_rope(config: RopeConfig, freq_factors: Float32Array | None = None) -> RopeTable:
    """Frequencies of one kind of layer.

    Args:
        config: the constants.
        freq_factors: (n_rot / 2,) divisors of the frequencies (the tensor `rope_freqs.weight` of Llama 3), or None.
    """
    half = config.n_rot // 2
    inv_freq = config.base ** (-np.arange(half, dtype=np.float64) / half)
    if freq_factors is not None:
        inv_freq = inv_freq / freq_factors.astype(np.float64)
    if config.scaling is RopeScaling.NONE:
        return RopeTable(config.style, config.n_rot, inv_freq, config.attention_factor)
    interpolated = inv_freq / config.factor
    if config.scaling is not RopeScaling.YARN:
        return RopeTable(config.style, config.n_rot, interpolated, config.attention_factor)
    mix = yarn_ramp(config) * config.extrapolation
    return RopeTable(config.style, config.n_rot, interpolated * (1.0 - mix) + inv_freq * mix, yarn_magnitude(config))


def yarn_ramp(config: RopeConfig) -> Float64Array:
    """(n_rot / 2,) in [0, 1]: 1 keeps a frequency, 0 interpolates it, by its turns within the original context."""

    def index_turning(times: float) -> float:
        turns = config.original_context / (times * 2.0 * math.pi)
        return config.n_rot * math.log(turns) / (2.0 * math.log(config.base))

    low = max(0.0, math.floor(index_turning(config.beta_fast)))
    high = min(config.n_rot - 1.0, math.ceil(index_turning(config.beta_slow)))
    ramp = (np.arange(config.n_rot // 2, dtype=np.float64) - low) / max(0.001, high - low)
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def yarn_magnitude(config: RopeConfig) -> float:
    """Factor on cos and sin that keeps attention as sharp as it was before stretching."""

    def magnitude(multiplier: float) -> float:
        return 1.0 if config.factor <= 1.0 else 0.1 * multiplier * math.log(config.factor) + 1.0

    if config.extrapolation == 0.0:
        return config.attention_factor
    base = magnitude(1.0)
    if config.log_multiplier != 0.0:
        base /= magnitude(config.log_multiplier)
    return base * config.attention_factor


def alibi_slopes(n_heads: int, max_bias: float) -> Float32Array:
    """(H,) slopes of attention with linear biases (Press et al. 2021, arXiv 2108.12409).

    Powers of 2^(-max_bias / n) for the largest power of two n within H; further heads take every other power of the
    slopes of 2n heads.
    """
    n = 1 << (n_heads.bit_length() - 1)
    exponents = [-max_bias * (head + 1) / n for head in range(n)]
    exponents += [-max_bias * (2 * head + 1) / (2 * n) for head in range(n_heads - n)]
    return np.exp2(np.array(exponents, dtype=np.float64)).astype(np.float32)
