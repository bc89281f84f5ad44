"""Float weights to packed blocks: a quantizer for every format that weights are stored in.

Plain ones: nearest numbers, scales by least squares (fitting.py), every weight equally important. They are for files to
test and to measure with; quantizers with an importance matrix do better at two bits and below. The layouts are those of
the format classes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from engine.gguf.formats.fp4_quants import E2M1_DOUBLED, E8M0_HALVED, UE4M3_HALVED
from engine.gguf.formats.i_quants import LEVELS
from engine.gguf.quantizers.fitting import (
    Floats,
    around,
    best_line,
    best_scale,
    divide,
    extreme,
    nearest_level,
    nearest_of,
    ternary,
    whole_numbers,
)
from engine.gguf.quantizers.grid_search import GRID_ENCODERS
from engine.gguf.quantizers.packing import pack_bits, pack_fields, pack_nibbles, scaled
from engine.gguf.quants import FORMATS, GGMLType

CHUNK = 1 << 18
"""Weights that are worked on together: the temporaries stay in the cache."""

Encoder = Callable[[Floats, np.ndarray], None]
"""Writes weights (n, block size) into blocks (n,) of the format's layout."""


def quantize(x: np.ndarray, type: GGMLType) -> np.ndarray:
    """Pack weights.

    Args:
        x: (..., n) floats, n a multiple of the block size.
        type: one of WRITABLE.

    Returns:
        uint8 (..., bytes of a row).

    Raises:
        ValueError: this type cannot be written, or the rows are no whole blocks.
    """
    fmt = FORMATS[type]
    if type not in _ENCODERS:
        raise ValueError(f"{type.name}: cannot be written; allowed: {', '.join(t.name for t in WRITABLE)}")
    if x.ndim == 0 or x.shape[-1] % fmt.block_size:
        raise ValueError(f"{type.name}: found shape {x.shape}; allowed: rows of a multiple of {fmt.block_size}")
    weights = np.ascontiguousarray(x, np.float32).reshape(-1, fmt.block_size)
    blocks = np.zeros(len(weights), fmt.layout)
    step = max(1, CHUNK // fmt.block_size)
    for start in range(0, len(weights), step):
        _ENCODERS[type](weights[start : start + step], blocks[start : start + step])
    return blocks.view(np.uint8).reshape(*x.shape[:-1], -1)


# -- plain numbers -----------------------------------------------------------------------------------------------------


def _plain(x: Floats, blocks: np.ndarray) -> None:
    blocks["x"] = x[:, 0]


def _bf16(x: Floats, blocks: np.ndarray) -> None:
    bits = x[:, 0].view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    blocks["x"] = np.where(np.isnan(x[:, 0]), bits >> 16 | 0x40, rounded)


# -- one or two scales per block ---------------------------------------------------------------------------------------


def _store(blocks: np.ndarray, name: str, values: Floats) -> Floats:
    """Write scales and return, as float32 (n, 1), what can be read back of them."""
    blocks[name] = values
    stored: Floats = blocks[name].astype(np.float32)[:, None]
    return stored


def _symmetric(bits: int, x: Floats, blocks: np.ndarray) -> None:
    """Q4_0 and Q5_0."""
    half = 1 << bits - 1
    rounded = whole_numbers(-half, half - 1)
    d = _store(blocks, "d", best_scale(x, around(-half, 0.9, 9), rounded))
    q = (rounded(divide(x, d)) + half).astype(np.uint8)
    blocks["qs"] = pack_nibbles(q & 15)
    if bits == 5:
        blocks["qh"] = pack_bits(q >> 4)


def _with_minimum(bits: int, x: Floats, blocks: np.ndarray) -> None:
    """Q4_1 and Q5_1."""
    scale, offset = best_line(x, (1 << bits) - 1, lowest_is_negative=False)
    d, m = _store(blocks, "d", scale), _store(blocks, "m", offset)
    q = np.clip(np.rint(divide(x - m, d)), 0, (1 << bits) - 1).astype(np.uint8)
    blocks["qs"] = pack_nibbles(q & 15)
    if bits == 5:
        blocks["qh"] = pack_bits(q >> 4)


def _eight_bits(x: Floats, blocks: np.ndarray) -> None:
    """Q8_0, Q8_1 and Q8_K."""
    d = _store(blocks, "d", np.abs(x).max(axis=-1) / np.float32(127))
    blocks["qs"] = np.clip(np.rint(divide(x, d)), -127, 127)
    names = blocks.dtype.names or ()
    if "s" in names:
        blocks["s"] = d[:, 0] * blocks["qs"].sum(axis=-1)
    if "bsums" in names:
        blocks["bsums"] = blocks["qs"].reshape(-1, 16, 16).sum(axis=-1)


_LEVELS: list[int] = LEVELS.tolist()


def _iq4_nl(x: Floats, blocks: np.ndarray) -> None:
    d = _store(blocks, "d", best_scale(x, around(float(LEVELS[0]), 20, 9), nearest_of(_LEVELS)))
    blocks["qs"] = pack_nibbles(nearest_level(_LEVELS, divide(x, d)))


def _tq1_0(x: Floats, blocks: np.ndarray) -> None:
    d, t = ternary(x)
    blocks["d"] = d
    t = (t + 1).astype(np.uint8)

    def packed(part: np.ndarray, digits: int) -> np.ndarray:
        # The base-3 digits of the fraction b / 256, rounded up so that none is lost.
        number = np.tensordot(part.reshape(len(part), digits, -1), 3 ** np.arange(4, 4 - digits, -1), (1, 0))
        return (number * 256 + 242) // 243

    blocks["qs"][:, :32], blocks["qs"][:, 32:] = packed(t[:, :160], 5), packed(t[:, 160:240], 5)
    blocks["qh"] = packed(t[:, 240:], 4)


def _tq2_0(x: Floats, blocks: np.ndarray) -> None:
    d, t = ternary(x)
    blocks["d"] = d
    blocks["qs"] = pack_fields((t + 1).astype(np.uint8), 32, 2)


def _q1_0(x: Floats, blocks: np.ndarray) -> None:
    blocks["d"] = np.abs(x).mean(axis=-1)
    blocks["qs"] = pack_bits(x >= 0)


def _q2_0(x: Floats, blocks: np.ndarray) -> None:
    rounded = whole_numbers(-1, 2)
    d = _store(blocks, "d", best_scale(x, around(2, 1.2, 12), rounded))
    blocks["qs"] = pack_fields((rounded(divide(x, d)) + 1).astype(np.uint8), 1, 2)


def _nearest_e2m1(x: Floats) -> np.ndarray:
    """4-bit numbers of values that have been divided by half a scale; ties go to the even one."""
    positive = E2M1_DOUBLED[:8].astype(np.float32)
    code = np.searchsorted((positive[1:] + positive[:-1]) / 2, np.abs(x)).astype(np.uint8)
    return code | np.signbit(x).astype(np.uint8) << 3


def _error_of_codes(x: Floats, half_scale: Floats) -> Floats:
    difference = E2M1_DOUBLED[_nearest_e2m1(divide(x, half_scale))] * half_scale - x
    error: Floats = np.einsum("...i,...i->...", difference, difference)
    return error


def _mxfp4(x: Floats, blocks: np.ndarray) -> None:
    # The largest weight becomes 4 to 6 as a rule; sometimes a neighbour of that exponent leaves less error.
    _, exponent = np.frexp(np.abs(x).max(axis=-1))
    choices = np.clip(exponent[:, None] - 3 + 127 + np.arange(-1, 2), 0, 254)
    errors = [_error_of_codes(x, E8M0_HALVED[choices[:, i]][:, None]) for i in range(3)]
    blocks["e"] = np.take_along_axis(choices, np.argmin(errors, axis=0)[:, None], axis=1)[:, 0]
    blocks["qs"] = pack_nibbles(_nearest_e2m1(divide(x, E8M0_HALVED[blocks["e"]][:, None])))


def _nvfp4(x: Floats, blocks: np.ndarray) -> None:
    parts = x.reshape(-1, 4, 16)
    table = UE4M3_HALVED[:0x7F]
    best, codes = np.full(parts.shape[:2], np.inf, np.float32), np.zeros(parts.shape[:2], np.uint8)
    for target in (12, 11, 10, 9, 8, 7, 6):
        wanted = np.abs(parts).max(axis=-1) / np.float32(target)
        code = np.searchsorted((table[1:] + table[:-1]) / 2, wanted).astype(np.uint8)
        error = _error_of_codes(parts, table[code][:, :, None])
        codes = np.where(error < best, code, codes)
        best = np.minimum(error, best)
    blocks["d"] = codes
    blocks["qs"] = pack_fields(_nearest_e2m1(divide(parts, table[codes][:, :, None])).reshape(len(x), -1), 8, 4)


# -- K formats and IQ4_XS: scales of sub-blocks, themselves quantized --------------------------------------------------


def _signed_scales(blocks: np.ndarray, scales: Floats, half: int) -> tuple[np.ndarray, Floats]:
    """Whole scales in -half ... half - 1 and the float32 scales (n, sub-blocks, 1) that they mean."""
    d = _store(blocks, "d", (extreme(scales) / np.float32(-half))[:, 0])
    whole = np.clip(np.rint(divide(scales, d)), -half, half - 1).astype(np.int32)
    return whole, scaled(d, whole)


def _q3_k(x: Floats, blocks: np.ndarray) -> None:
    groups, rounded = x.reshape(-1, 16, 16), whole_numbers(-4, 3)
    whole, scales = _signed_scales(blocks, best_scale(groups, around(-4, 0.9, 9), rounded), 32)
    q = (rounded(divide(groups, scales)) + 4).astype(np.uint8).reshape(-1, 256)
    six = (whole + 32).astype(np.uint8)
    blocks["qs"], blocks["hmask"] = pack_fields(q & 3, 32, 2), pack_fields(q >> 2, 32, 1)
    blocks["scales"][:, :8] = pack_fields(six & 15, 8, 4)
    blocks["scales"][:, 8:] = pack_fields(six >> 4, 4, 2)


def _q6_k(x: Floats, blocks: np.ndarray) -> None:
    groups, rounded = x.reshape(-1, 16, 16), whole_numbers(-32, 31)
    whole, scales = _signed_scales(blocks, best_scale(groups, around(-32, 0.9, 6), rounded), 128)
    q = (rounded(divide(groups, scales)) + 32).astype(np.uint8).reshape(-1, 256)
    blocks["scales"] = whole
    blocks["ql"], blocks["qh"] = pack_fields(q & 15, 64, 4), pack_fields(q >> 4, 32, 2)


def _iq4_xs(x: Floats, blocks: np.ndarray) -> None:
    groups = x.reshape(-1, 8, 32)
    fitted = best_scale(groups, around(float(LEVELS[0]), 20, 9), nearest_of(_LEVELS))
    whole, scales = _signed_scales(blocks, fitted, 32)
    six = (whole + 32).astype(np.uint8)
    blocks["scales_l"] = pack_fields(six & 15, 1, 4)
    blocks["scales_h"] = pack_fields(six >> 4, 1, 2).view("<u2")[:, 0]
    blocks["qs"] = pack_fields(nearest_level(_LEVELS, divide(groups, scales)).reshape(-1, 256), 16, 4)


def _lines(blocks: np.ndarray, groups: Floats, bits: int, scale_bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quants (n, 256), whole scales and whole minima of Q2_K, Q4_K and Q5_K."""
    high, most = (1 << bits) - 1, np.float32((1 << scale_bits) - 1)
    scale, offset = best_line(groups, high, lowest_is_negative=True)
    d = _store(blocks, "d", scale.max(axis=-1) / most)
    dmin = _store(blocks, "dmin", -offset.min(axis=-1) / most)
    scales = np.clip(np.rint(divide(scale, d)), 0, most).astype(np.uint8)
    mins = np.clip(np.rint(divide(-offset, dmin)), 0, most).astype(np.uint8)
    q = np.clip(np.rint(divide(groups + scaled(dmin, mins), scaled(d, scales))), 0, high).astype(np.uint8)
    return q.reshape(-1, 256), scales, mins


def _q2_k(x: Floats, blocks: np.ndarray) -> None:
    q, scales, mins = _lines(blocks, x.reshape(-1, 16, 16), 2, 4)
    blocks["scales"], blocks["qs"] = scales | mins << 4, pack_fields(q, 32, 2)


def _q4_k_q5_k(bits: int, x: Floats, blocks: np.ndarray) -> None:
    q, s, m = _lines(blocks, x.reshape(-1, 8, 32), bits, 6)
    blocks["scales"][:, 0:4] = s[:, :4] | s[:, 4:] >> 4 << 6
    blocks["scales"][:, 4:8] = m[:, :4] | m[:, 4:] >> 4 << 6
    blocks["scales"][:, 8:] = s[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    blocks["qs"] = pack_fields(q & 15, 32, 4)
    if bits == 5:
        blocks["qh"] = pack_fields(q >> 4, 32, 1)


_T: Any = GGMLType
_ENCODERS: dict[GGMLType, Encoder] = {
    **dict.fromkeys((_T.F32, _T.F16, _T.F64), _plain),
    _T.BF16: _bf16,
    _T.Q4_0: partial(_symmetric, 4),
    _T.Q4_1: partial(_with_minimum, 4),
    _T.Q5_0: partial(_symmetric, 5),
    _T.Q5_1: partial(_with_minimum, 5),
    **dict.fromkeys((_T.Q8_0, _T.Q8_1, _T.Q8_K), _eight_bits),
    _T.Q2_K: _q2_k,
    _T.Q3_K: _q3_k,
    _T.Q4_K: partial(_q4_k_q5_k, 4),
    _T.Q5_K: partial(_q4_k_q5_k, 5),
    _T.Q6_K: _q6_k,
    _T.IQ4_NL: _iq4_nl,
    _T.IQ4_XS: _iq4_xs,
    _T.TQ1_0: _tq1_0,
    _T.TQ2_0: _tq2_0,
    _T.MXFP4: _mxfp4,
    _T.NVFP4: _nvfp4,
    _T.Q1_0: _q1_0,
    _T.Q2_0: _q2_0,
    **GRID_ENCODERS,
}

WRITABLE: tuple[GGMLType, ...] = tuple(sorted(_ENCODERS))
"""Types that quantize() writes: all but the whole numbers, to which small weights would be zeros."""
