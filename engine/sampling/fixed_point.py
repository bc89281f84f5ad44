"""Unnormalized probabilities as integers, so that every sum is exact in any order.

A token's weight is exp((logit - largest logit) / temperature), computed in float32 by a fixed sequence of single
additions, subtractions, multiplications and divisions, then cut to a multiple of 2**-40. Integer sums do not depend on
the order of the terms: the CPU here and thousands of GPU threads get the same totals, so one seed gives one text.
Tokens below 2**-40 (about 1e-12) of the most probable one have weight 0 and are never drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
FloatArray = NDArray[np.float32]
WeightArray = NDArray[np.int64]

FRACTION_BITS = 40
SMALLEST = F32(-30.0)  # exp(-30) < 2**-43
LOG2_E = F32(1.44269504)
LN2_HIGH = F32(0.693359375)  # ten bits: a product with a small integer is exact
LN2_LOW = F32(-2.12194440e-4)
# 1/7! … 1/2!: for |r| <= ln(2)/2 the rest of the series is below 1e-8
SERIES = tuple(F32(1.0 / n) for n in (5040.0, 720.0, 120.0, 24.0, 6.0, 2.0))
SCALE = F32(2.0**FRACTION_BITS)


def exponential(x: FloatArray) -> FloatArray:
    """exp(x) for x <= 0, 0 below -30; relative error under 3e-7, the same bits on every device.

    No fused multiply-add: each operation rounds once, as the kernel does with __fmul_rn and __fadd_rn.
    """
    low = x < SMALLEST
    x = np.maximum(x, SMALLEST)
    n = np.rint(x * LOG2_E)
    r = x - n * LN2_HIGH
    r -= n * LN2_LOW
    y: FloatArray = r * SERIES[0]
    for coefficient in SERIES[1:]:
        y += coefficient
        y *= r
    y *= r
    y += r
    y += F32(1.0)
    power = ((n.astype(np.int32) + 127) << 23).view(np.float32)
    y *= power
    y[low] = 0.0
    return y


def distances(logits: FloatArray, largest: np.float32, temperature: float) -> FloatArray:
    """(logit - largest) / temperature in float32: 0 for the largest, negative for the others, -inf allowed."""
    with np.errstate(over="ignore"):
        return (logits - largest) / F32(temperature)


def fixed_point(weights: FloatArray) -> WeightArray:
    """Weights in [0, 1] as multiples of 2**-40, cut towards zero."""
    return (weights * SCALE).astype(np.int64)


def share(p: float, total: int) -> int:
    """The smallest integer mass that counts as reaching the share p of total; at least 1."""
    return max(1, int(np.ceil(np.float64(F32(p)) * np.float64(total))))


def log_of_total(total: int) -> np.float32:
    """Natural logarithm of a fixed-point total, in float32."""
    return F32(np.log(np.float64(total) * 2.0**-FRACTION_BITS))
