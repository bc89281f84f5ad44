"""Quantizers of the formats with grids: the nearest point for every 4 or 8 weights, and scales that suit them.

A weight vector is first rounded coordinate by coordinate to the levels that the grid's points have. A table says which
points are nearest to each vector of levels; the best of the first few is taken. So no vector is compared with the whole
grid, and nearly always the nearest point is found.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from engine.gguf.formats.grids import grid
from engine.gguf.formats.i_quants import IQ1_DELTA
from engine.gguf.quantizers.fitting import Floats, divide
from engine.gguf.quantizers.packing import pack_bits, pack_fields
from engine.gguf.types import GGMLType

NEIGHBOURS = 8
"""Points compared with each vector in the end."""

TARGETS = np.linspace(0.85, 1.75, 10)
"""Where candidate scales bring a group's largest weight, in units of the largest level: also beyond all points."""


@dataclass(frozen=True)
class Search:
    """A grid made ready for searching.

    Attributes:
        points: (N, w) float32.
        levels: what a coordinate can be, ascending.
        nearest: (levels ** w, NEIGHBOURS) the points nearest to each vector of levels, best first.
    """

    points: Floats
    levels: Floats
    nearest: npt.NDArray[np.int64]

    def quick(self, x: Floats) -> npt.NDArray[np.int64]:
        """Points near vectors (..., w): those nearest to the vectors rounded to levels."""
        points: npt.NDArray[np.int64] = self.nearest[self._codes(x), 0]
        return points

    def best(self, x: Floats) -> npt.NDArray[np.int64]:
        """The best of NEIGHBOURS points for vectors (..., w)."""
        choices = self.nearest[self._codes(x)]
        points = self.points[choices]
        # Half of |p|² - <x, p> orders points as their distance does.
        distance = np.einsum("...kw,...kw->...k", points, points) / 2 - np.einsum("...kw,...w->...k", points, x)
        return np.take_along_axis(choices, distance.argmin(axis=-1)[..., None], axis=-1)[..., 0]

    def _codes(self, x: Floats) -> npt.NDArray[np.int64]:
        digits = np.searchsorted((self.levels[1:] + self.levels[:-1]) / 2, x)
        return digits @ (len(self.levels) ** np.arange(x.shape[-1]))


@cache
def _search(name: str) -> Search:
    points = grid(name).astype(np.float32)
    levels, width = np.unique(points), points.shape[1]
    codes = np.arange(len(levels) ** width)
    vectors = levels[codes[:, None] // len(levels) ** np.arange(width) % len(levels)]
    distances = (points * points).sum(axis=1) - 2 * vectors @ points.T
    return Search(points, levels, np.argsort(distances, axis=1, kind="stable")[:, :NEIGHBOURS])


# -- grids of magnitudes, signs apart ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Weights of n blocks as points.

    Attributes:
        index: (n, points of a block).
        signs: (n, 32) a byte of sign bits per 8 weights.
        scale: (n, groups) whole numbers.
        d: (n,) float16.
    """

    index: npt.NDArray[np.int64]
    signs: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.int64]
    d: npt.NDArray[np.float16]


def _without_signs(x: Floats, *, even: bool) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Weights (n, 256) with the signs taken out, and those, a byte per 8 weights.

    Where the number of minus signs has to be even, the smallest of 8 weights takes the wrong one if the number is odd.
    """
    eights = x.reshape(-1, 8)
    negative = eights < 0
    if even:
        odd = np.flatnonzero(negative.sum(axis=1) & 1)
        smallest = np.abs(eights[odd]).argmin(axis=1)
        negative[odd, smallest] ^= True
    return np.where(negative, -eights, eights).reshape(x.shape), pack_bits(negative).reshape(len(x), -1)


def _fit(name: str, x: Floats, *, group: int, even: bool, first: float, step: float) -> Fit:
    """Find points and scales; a group of `group` weights is multiplied by d (first + step · s), s in 0 ... 15."""
    search = _search(name)
    n, width = len(x), search.points.shape[1]
    magnitudes, signs = _without_signs(x, even=even)
    groups = magnitudes.reshape(n, -1, group // width, width)
    largest = groups.max(axis=(2, 3))
    wanted, best = np.zeros(largest.shape, np.float32), np.zeros(largest.shape, np.float32)
    for target in TARGETS * search.levels[-1]:
        points = search.points[search.quick(groups * divide(np.float32(target), largest)[:, :, None, None])]
        along, square = (np.einsum("ngpw,ngpw->ng", points, other) for other in (groups, points))
        better = along * along > best * square
        best = np.where(better, along * along / square, best)
        wanted = np.where(better, along / square, wanted)
    d = (wanted.max(axis=1) / np.float32(first + 15 * step)).astype(np.float16)
    whole = np.clip(np.rint((divide(wanted, d[:, None].astype(np.float32)) - first) / step), 0, 15).astype(np.int64)
    factors = (first + step * whole).astype(np.float32)
    index = search.best(divide(groups, (d[:, None] * factors)[:, :, None, None]))
    # The points are fixed now: the best scale of the block for them.
    points = search.points[index]
    along, square = (np.einsum("ngpw,ngpw->ng", points, other) for other in (groups, points))
    d = divide((factors * along).sum(axis=1), (factors * factors * square).sum(axis=1)).astype(np.float16)
    return Fit(index.reshape(n, -1), signs, whole, d)


def _signs_and_scales(fit: Fit) -> npt.NDArray[np.uint32]:
    """Four times 7 sign bits and a scale of 4 bits, for every 32 weights."""
    seven = (fit.signs & 0x7F).reshape(len(fit.signs), -1, 4).astype(np.uint32)
    packed = np.bitwise_or.reduce(seven << np.arange(0, 28, 7, dtype=np.uint32), axis=2)
    words: npt.NDArray[np.uint32] = packed | fit.scale.astype(np.uint32) << 28
    return words


def _iq2_xxs(x: Floats, blocks: np.ndarray) -> None:
    fit = _fit("IQ2_XXS", x, group=32, even=True, first=0.125, step=0.25)
    blocks["d"] = fit.d
    blocks["groups"]["qs"], blocks["groups"]["signs"] = fit.index.reshape(-1, 8, 4), _signs_and_scales(fit)


def _iq2_xs(x: Floats, blocks: np.ndarray) -> None:
    fit = _fit("IQ2_XS", x, group=16, even=True, first=0.125, step=0.25)
    blocks["d"], blocks["scales"] = fit.d, pack_fields(fit.scale.astype(np.uint8), 1, 4)
    blocks["qs"] = fit.index | (fit.signs & 0x7F).astype(np.int64) << 9


def _iq2_s(x: Floats, blocks: np.ndarray) -> None:
    fit = _fit("IQ2_S", x, group=16, even=False, first=0.125, step=0.25)
    blocks["d"], blocks["scales"] = fit.d, pack_fields(fit.scale.astype(np.uint8), 1, 4)
    blocks["qs"], blocks["signs"] = fit.index & 0xFF, fit.signs
    blocks["qh"] = pack_fields((fit.index >> 8).astype(np.uint8), 1, 2)


def _iq3_xxs(x: Floats, blocks: np.ndarray) -> None:
    fit = _fit("IQ3_XXS", x, group=32, even=True, first=0.25, step=0.5)
    blocks["d"], blocks["qs"], blocks["signs"] = fit.d, fit.index, _signs_and_scales(fit)


def _iq3_s(x: Floats, blocks: np.ndarray) -> None:
    fit = _fit("IQ3_S", x, group=32, even=False, first=1, step=2)
    blocks["d"], blocks["scales"] = fit.d, pack_fields(fit.scale.astype(np.uint8), 1, 4)
    blocks["qs"], blocks["signs"] = fit.index & 0xFF, fit.signs
    blocks["qh"] = pack_bits(fit.index >> 8)


# -- the ternary grid of IQ1_S and IQ1_M, moved up or down as a whole --------------------------------------------------

_SHIFTS = (IQ1_DELTA, -IQ1_DELTA)


def _shifted(x: Floats, find: Callable[[Floats], np.ndarray], eights: int) -> tuple[np.ndarray, np.ndarray, Floats]:
    """Points for weights divided by their scale, (n, groups, 8-vectors, 8).

    The shift is chosen for every `eights` 8-vectors in a row.

    Returns:
        index (n, groups, vectors), whether 1/8 is taken away (same shape), and the weights that these mean.
    """
    points = _search("IQ1_S").points
    indices = [find(x - shift) for shift in _SHIFTS]
    values = [points[index] + shift for index, shift in zip(indices, _SHIFTS, strict=True)]
    up, down = (((found - x) ** 2).sum(axis=-1) for found in values)
    together = (down - up).reshape(*up.shape[:2], -1, eights).sum(axis=-1)
    taken = np.repeat(together < 0, eights, axis=-1)
    return np.where(taken, indices[1], indices[0]), taken, np.where(taken[..., None], values[1], values[0])


def _fit_ternary(x: Floats, *, group: int, eights: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Index and shift (n, 32), whole scales (n, groups) in 0 ... 7 and d (n,) float16."""
    search = _search("IQ1_S")
    groups = x.reshape(len(x), -1, group // 8, 8)
    largest = np.abs(groups).max(axis=(2, 3))
    wanted, best = np.zeros(largest.shape, np.float32), np.zeros(largest.shape, np.float32)
    for target in TARGETS + 0.25:
        scaled = groups * divide(np.float32(target), largest)[:, :, None, None]
        _, _, values = _shifted(scaled, search.quick, eights)
        along, square = (np.einsum("ngpw,ngpw->ng", values, other) for other in (groups, values))
        better = (along > 0) & (along * along > best * square)
        best = np.where(better, divide(along * along, square), best)
        wanted = np.where(better, divide(along, square), wanted)
    d = (wanted.max(axis=1) / np.float32(15)).astype(np.float16)
    whole = np.clip(np.rint((divide(wanted, d[:, None].astype(np.float32)) - 1) / 2), 0, 7).astype(np.int64)
    factors = (1 + 2 * whole).astype(np.float32)
    index, taken, values = _shifted(divide(groups, (d[:, None] * factors)[:, :, None, None]), search.best, eights)
    along, square = (np.einsum("ngpw,ngpw->ng", values, other) for other in (groups, values))
    d = divide((factors * along).sum(axis=1), (factors * factors * square).sum(axis=1)).astype(np.float16)
    return index.reshape(len(x), 32), taken.reshape(len(x), 32), whole, d


def _iq1_s(x: Floats, blocks: np.ndarray) -> None:
    index, taken, whole, blocks["d"] = _fit_ternary(x, group=32, eights=4)
    high = np.bitwise_or.reduce((index >> 8).reshape(-1, 8, 4) << np.arange(0, 12, 3), axis=2)
    blocks["qs"], blocks["qh"] = index & 0xFF, high | whole << 12 | taken[:, ::4].astype(np.int64) << 15


def _iq1_m(x: Floats, blocks: np.ndarray) -> None:
    index, taken, whole, d = _fit_ternary(x, group=16, eights=1)
    blocks["qs"] = index & 0xFF
    blocks["qh"] = pack_fields((index >> 8 | taken.astype(np.int64) << 3).astype(np.uint8), 1, 4)
    threes = np.bitwise_or.reduce(whole.reshape(-1, 4, 4) << np.arange(0, 12, 3), axis=2)
    quarters = d.view(np.uint16)[:, None].astype(np.int64) >> np.arange(0, 16, 4) & 15
    blocks["scales"] = threes | quarters << 12


GRID_ENCODERS: dict[GGMLType, Callable[[Floats, np.ndarray], None]] = {
    GGMLType.IQ2_XXS: _iq2_xxs,
    GGMLType.IQ2_XS: _iq2_xs,
    GGMLType.IQ2_S: _iq2_s,
    GGMLType.IQ3_XXS: _iq3_xxs,
    GGMLType.IQ3_S: _iq3_s,
    GGMLType.IQ1_S: _iq1_s,
    GGMLType.IQ1_M: _iq1_m,
}
"""Writes weights (n, 256) into blocks (n,) of the format's layout."""
