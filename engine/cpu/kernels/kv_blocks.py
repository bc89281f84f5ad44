"""Emits the rounding of cached rows to 8 bits: engine/model/kv_format.py, bit for bit."""

from llvmlite import ir

from engine.config import KV_BLOCK
from engine.cpu.kernels.emit import F32, I8, I16, I32, Emitter, Value, vector

_BELOW_HALF = 0.49999997
"""The largest float32 below 0.5: added before the fraction is cut off, it rounds halves up and nothing else."""


def quantize_row(e: Emitter, x: Value) -> tuple[Value, Value]:
    """A block of KV_BLOCK float32 as int8, and its scale as the i16 of a float16."""
    b, integers = e.builder, vector(I32, KV_BLOCK)
    # As integers magnitudes have the order of floats, with those of no numbers above all others.
    sizes = e.mask(b.bitcast(x, integers), 0x7FFFFFFF)
    while sizes.type.count > 1:
        half = sizes.type.count // 2
        low, high = e.part(sizes, 0, half), e.part(sizes, half, half)
        sizes = b.select(b.icmp_unsigned(">", low, high), low, high)
    d = b.fdiv(b.bitcast(b.extract_element(sizes, I32(0)), F32), F32(127.0))
    scale = b.extract_element(e.float_to_half(e.splat(d, 8)), I32(0))
    usable = b.icmp_unsigned("<", b.sub(scale, I16(1)), I16(0x7BFF))  # not 0, not infinite, a number
    inverse = b.select(usable, b.fdiv(F32(1.0), d), F32(0.0))
    scaled = e.multiply(x, e.splat(inverse, KV_BLOCK))
    sign = b.and_(b.bitcast(scaled, integers), ir.Constant(integers, [-(1 << 31)] * KV_BLOCK))
    nearly = b.bitcast(e.const(x, _BELOW_HALF), integers)
    rounded = b.fadd(scaled, b.bitcast(b.or_(sign, nearly), x.type))
    quants = b.trunc(b.fptosi(rounded, integers), vector(I8, KV_BLOCK))
    return b.select(e.splat(usable, KV_BLOCK), quants, ir.Constant(quants.type, [0] * KV_BLOCK)), scale
