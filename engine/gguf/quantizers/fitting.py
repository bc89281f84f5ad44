"""Scales that let groups of weights be rounded with the least error: least squares over a few candidates.

A candidate scale says how every weight is rounded; for those whole numbers the best scale is then a quotient of sums.
The candidate with the least error is taken. All functions work on rows of a group each, in float32.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rounding = Callable[[Floats], Floats]
"""Weights divided by a scale, any shape, to the nearest numbers that the format can express."""


def divide(a: np.ndarray | np.float32, b: np.ndarray | np.float32) -> Floats:
    """A / b as float32, 0 where b is 0."""
    result = np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)
    return np.asarray(result, np.float32)


def extreme(x: Floats) -> Floats:
    """The number of largest magnitude of every group, with its sign: (..., g) to (..., 1)."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)


def whole_numbers(low: int, high: int) -> Rounding:
    """Rounding to the whole numbers low ... high."""

    def rounded(x: Floats) -> Floats:
        return np.clip(np.rint(x), low, high)

    return rounded


def nearest_of(levels: Sequence[int]) -> Rounding:
    """Rounding to ascending whole levels."""
    values = np.asarray(levels, np.float32)

    def rounded(x: Floats) -> Floats:
        nearest: Floats = values[nearest_level(levels, x)]
        return nearest

    return rounded


def nearest_level(levels: Sequence[int], x: Floats) -> np.ndarray:
    """Which of ascending whole levels is nearest to every x, uint8.

    Looked up by x in steps of 1/2, which is several times faster than a search and nearly as good: only within 1/4 of
    the middle between two levels may it take the other one.
    """
    low, high = 2 * levels[0], 2 * levels[-1]
    halves = np.arange(low, high + 1) / 2
    middles = (np.asarray(levels[1:]) + np.asarray(levels[:-1])) / 2
    table = np.searchsorted(middles, halves).astype(np.uint8)
    return table[np.clip(np.rint(2 * x), low, high).astype(np.int32) - low]


def best_scale(x: Floats, targets: Sequence[float], rounded: Rounding) -> Floats:
    """The scale d of every group for which d · rounded(x / d) is nearest to x.

    Args:
        x: (..., g) weights.
        targets: numbers that the weight of largest magnitude may be brought to, one after the other.
        rounded: how weights divided by a scale are rounded.

    Returns:
        (...,) float32; 0 for groups of zeros. The sign is free.
    """
    largest = extreme(x)
    scale = np.zeros(x.shape[:-1], np.float32)
    best = np.zeros(x.shape[:-1], np.float32)
    for target in targets:
        q = rounded(x * divide(np.float32(target), largest))
        along, square = np.einsum("...i,...i->...", x, q), np.einsum("...i,...i->...", q, q)
        # |x - d q|² is least for d = <x, q> / <q, q>, and then smaller than |x|² by <x, q>² / <q, q>.
        candidate = divide(along, square)
        better = along * candidate > best
        best = np.where(better, along * candidate, best)
        scale = np.where(better, candidate, scale)
    return scale


def around(target: float, reach: float, count: int) -> list[float]:
    """Candidates for best_scale: target and `count` numbers on either side of it, up to `reach` away."""
    return [target + reach * step / count for step in range(-count, count + 1)]


def best_line(x: Floats, high: int, *, lowest_is_negative: bool) -> tuple[Floats, Floats]:
    """Scale d and offset m of every group for which d · q + m, q in 0 ... high, is nearest to x.

    Args:
        x: (..., g) weights.
        high: largest q.
        lowest_is_negative: m must not be above 0, for formats that store -m without a sign.

    Returns:
        (d, m), both (...,) float32.
    """
    n, low, top = x.shape[-1], x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    if lowest_is_negative:
        low = np.minimum(low, 0)
    total, squares = x.sum(axis=-1), np.einsum("...i,...i->...", x, x)
    scale, offset = divide(top - low, np.float32(high))[..., 0], low[..., 0]
    best = np.full(x.shape[:-1], np.inf, np.float32)
    for step in range(-10, 11):
        q = np.clip(np.rint((x - low) * divide(np.float32(high + 0.1 * step), top - low)), 0, high)
        q1, q2, xq = q.sum(axis=-1), np.einsum("...i,...i->...", q, q), np.einsum("...i,...i->...", x, q)
        determinant = n * q2 - q1 * q1
        d, m = divide(n * xq - total * q1, determinant), divide(q2 * total - q1 * xq, determinant)
        if lowest_is_negative:
            d, m = np.where(m > 0, divide(xq, q2), d), np.minimum(m, 0)
        error = squares + d * (d * q2 + 2 * m * q1 - 2 * xq) + m * (n * m - 2 * total)
        better = (error < best) & (d > 0)
        best = np.where(better, error, best)
        scale, offset = np.where(better, d, scale), np.where(better, m, offset)
    return scale, offset


def ternary(x: Floats) -> tuple[Floats, Floats]:
    """The scale d (...,) and the t in -1, 0, 1 for which d · t is nearest to x (..., g): no search, the best of all."""
    magnitudes = -np.sort(-np.abs(x), axis=-1)
    sums = np.cumsum(magnitudes, axis=-1)
    # With the k largest rounded to 1 the best d is their mean, and the error shrinks by the square of their sum over k.
    k = np.argmax(sums * sums / np.arange(1, x.shape[-1] + 1, dtype=np.float32), axis=-1, keepdims=True)
    d = np.take_along_axis(sums, k, axis=-1) / (k + 1).astype(np.float32)
    kept = np.abs(x) >= np.take_along_axis(magnitudes, k, axis=-1)
    return d[..., 0].astype(np.float32), np.where(kept, np.sign(x), 0).astype(np.float32)
