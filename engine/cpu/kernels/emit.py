"""Functions for emitting 16-lane vector code inside numba intrinsics.

Wide LLVM vectors are portable: the same lines become AVX2, AVX-512 or NEON instructions, whichever the host has.
Independent of block formats; values are llvmlite IR values, constants are Python numbers.
"""

import struct
from collections.abc import Sequence
from typing import Any

from llvmlite import ir

LANES = 16
"""Partial sums per dot product. Lane j adds the products of columns k with k % 16 == j, in increasing k, everywhere.

Every kernel keeps this order, so a product has the same bits from each kernel and beside any other rows.
"""

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()

Value = Any
"""An llvmlite IR value (the library carries no annotations)."""


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """The vector type of `lanes` elements."""
    return ir.VectorType(element, lanes)


class Emitter:
    """Writes IR at one place of one function.

    Args:
        builder: where the instructions go.
        native_half: the host converts float16 in hardware; without it the conversion is spelled out in integers,
            because the fallback LLVM would call is not in every process.
    """

    def __init__(self, builder: ir.IRBuilder, *, native_half: bool) -> None:
        self.builder = builder
        self.native_half = native_half

    # Memory. Addresses are i64; packed blocks have no alignment.
    def pointer(self, address: Value, element: ir.Type) -> Value:
        """The address as a typed pointer."""
        return self.builder.inttoptr(address, element.as_pointer())

    def at(self, address: Value, offset: int) -> Value:
        """Address plus a constant number of bytes."""
        return self.builder.add(address, I64(offset)) if offset else address

    def load(self, address: Value, kind: ir.Type, offset: int = 0, align: int = 1) -> Value:
        """Loads one scalar or vector of type `kind` at address + offset bytes."""
        return self.builder.load(self.pointer(self.at(address, offset), kind), align=align)

    def store(self, value: Value, address: Value, offset: int = 0, align: int = 4) -> None:
        """Stores a scalar or vector at address + offset bytes."""
        self.builder.store(value, self.pointer(self.at(address, offset), value.type), align=align)

    def stream(self, value: Value, address: Value) -> None:
        """Stores a vector at an address that is a multiple of its size, past the caches."""
        stored = self.builder.store(value, self.pointer(address, value.type), align=4 * value.type.count)
        stored.set_metadata("nontemporal", self.builder.module.add_metadata([I32(1)]))

    def bytes(self, address: Value, offset: int, lanes: int = LANES) -> Value:
        """Loads `lanes` bytes as a vector."""
        return self.load(address, vector(I8, lanes), offset)

    def room(self, n_bytes: int) -> Value:
        """Address of n_bytes on the stack that are not cleared, at a cache line."""
        line = 64
        with self.builder.goto_entry_block():
            room = self.builder.alloca(I8, size=n_bytes + line)
        start = self.builder.add(self.builder.ptrtoint(room, I64), I64(line - 1))
        return self.builder.and_(start, I64(-line))

    def prefetch(self, address: Value, level: int = 1) -> None:
        """Prefetches the cache line at an address, which may be any, into a level of the cache."""
        name, pointer = "llvm.prefetch.p0i8", I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), (pointer, I32, I32, I32))
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        self.builder.call(function, (self.builder.inttoptr(address, pointer), I32(0), I32(4 - level), I32(1)))

    # Integers.
    def const(self, like: Value, number: float) -> Value:
        """A number of the type of `like`, repeated over its lanes."""
        if isinstance(number, float):
            number = struct.unpack("f", struct.pack("f", number))[0]
        if isinstance(like.type, ir.VectorType):
            return ir.Constant(like.type, [number] * like.type.count)
        return ir.Constant(like.type, number)

    def mask(self, value: Value, bits: int) -> Value:
        """Value & bits."""
        return self.builder.and_(value, self.const(value, bits))

    def shift_right(self, value: Value, count: int) -> Value:
        """Unsigned value >> count."""
        return self.builder.lshr(value, self.const(value, count)) if count else value

    def shift_left(self, value: Value, count: int) -> Value:
        """Value << count."""
        return self.builder.shl(value, self.const(value, count)) if count else value

    def move_bits(self, value: Value, bits: int, source: int, target: int) -> Value:
        """(value >> source & bits) << target, with one shift."""
        if source >= target:
            return self.mask(self.shift_right(value, source - target), bits << target)
        return self.mask(self.shift_left(value, target - source), bits << target)

    def minus(self, value: Value, number: int) -> Value:
        """Integer value - number."""
        return self.builder.sub(value, self.const(value, number))

    def either(self, a: Value, b: Value) -> Value:
        """a | b."""
        return self.builder.or_(a, b)

    def join(self, values: Sequence[Value], kind: ir.Type) -> Value:
        """Scalars of one type side by side, seen as a vector of type `kind`."""
        packed = ir.Constant(vector(values[0].type, len(values)), ir.Undefined)
        for lane, value in enumerate(values):
            packed = self.builder.insert_element(packed, value, I32(lane))
        return self.builder.bitcast(packed, kind)

    def spread_bits(self, bits: Value, number: int) -> Value:
        """An i16 becomes 16 bytes: lane j is `number` where bit j is set, else 0."""
        flags = self.builder.bitcast(bits, vector(ir.IntType(1)))
        zero = ir.Constant(vector(I8), [0] * LANES)
        return self.builder.select(flags, self.const(zero, number), zero)

    def look_up(self, table: Sequence[int], indices: Value) -> Value:
        """Bytes of a table of 16, by a vector of indices below 16."""
        values = [ir.Constant(indices.type, [number & 0xFF] * indices.type.count) for number in table]
        for bit in range(4):
            here = self.builder.icmp_unsigned("!=", self.mask(indices, 1 << bit), self.const(indices, 0))
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [self.builder.select(here, high, low) for low, high in pairs]
        return values[0]

    # Floats.
    def unsigned_to_float(self, value: Value) -> Value:
        """Unsigned bytes to float32, through 32-bit integers."""
        wide = self.builder.zext(value, vector(I32, value.type.count))
        return self.builder.sitofp(wide, vector(F32, value.type.count))

    def signed_to_float(self, value: Value) -> Value:
        """Signed bytes to float32."""
        wide = self.builder.sext(value, vector(I32, value.type.count))
        return self.builder.sitofp(wide, vector(F32, value.type.count))

    def half_to_float(self, bits: Value) -> Value:
        """Float16 given as i16 (scalar or vector) to float32, exact for every pattern including subnormals."""
        b = self.builder
        lanes = bits.type.count if isinstance(bits.type, ir.VectorType) else 0

        def like(element: ir.Type) -> ir.Type:
            return vector(element, lanes) if lanes else element

        if self.native_half:
            return b.fpext(b.bitcast(bits, like(F16)), like(F32))
        wide = b.zext(bits, like(I32))
        sign = self.shift_left(self.mask(wide, 0x8000), 16)
        magnitude = self.shift_left(self.mask(wide, 0x7FFF), 13)
        # The exponent bias differs by 112; a multiplication by 2**112 also normalises subnormals.
        factor = b.bitcast(self.const(wide, 0x77800000), like(F32))
        scaled = b.bitcast(b.fmul(b.bitcast(magnitude, like(F32)), factor), like(I32))
        special = b.icmp_unsigned(">=", magnitude, self.const(wide, 0x0F800000))
        scaled = b.select(special, b.or_(magnitude, self.const(wide, 0x7F800000)), scaled)
        return b.bitcast(b.or_(scaled, sign), like(F32))

    def float_to_half(self, values: Value) -> Value:
        """A vector of float32 to float16 given as i16, rounded to nearest, ties to even."""
        b, lanes = self.builder, values.type.count
        if self.native_half:
            return b.bitcast(b.fptrunc(values, vector(F16, lanes)), vector(I16, lanes))
        bits = b.bitcast(values, vector(I32, lanes))
        sign = self.mask(self.shift_right(bits, 16), 0x8000)
        magnitude = self.mask(bits, 0x7FFFFFFF)
        # Normal results: move the exponent's offset from 127 to 15, then round away 13 bits.
        odd = self.mask(self.shift_right(magnitude, 13), 1)
        normal = self.shift_right(b.add(self.minus(magnitude, (112 << 23) - 0xFFF), odd), 13)
        # Subnormal ones: adding 0.5 leaves the last bit of the sum worth one unit of theirs.
        half = self.const(values, 0.5)
        tiny = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, values.type), half), bits.type), self.const(bits, 126 << 23))
        result = b.select(b.icmp_unsigned("<", magnitude, self.const(bits, 113 << 23)), tiny, normal)
        nan = b.icmp_unsigned(">", magnitude, self.const(bits, 0x7F800000))
        special = b.select(nan, self.const(bits, 0x7E00), self.const(bits, 0x7C00))
        result = b.select(b.icmp_unsigned("<", magnitude, self.const(bits, 143 << 23)), result, special)
        return b.trunc(b.or_(result, sign), vector(I16, lanes))

    def half(self, address: Value, offset: int) -> Value:
        """Loads one float16 as a float32 scalar."""
        return self.half_to_float(self.load(address, I16, offset))

    def brain_to_float(self, bits: Value) -> Value:
        """A vector of bfloat16 given as i16 to float32."""
        wide = self.builder.zext(bits, vector(I32, bits.type.count))
        return self.builder.bitcast(self.shift_left(wide, 16), vector(F32, bits.type.count))

    def splat(self, scalar: Value, lanes: int = LANES) -> Value:
        """A scalar repeated over all lanes."""
        kind = vector(scalar.type, lanes)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), self._lanes([0] * lanes))

    def splat_lane(self, value: Value, lane: int) -> Value:
        """One lane of a vector repeated over 16 lanes."""
        return self.builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), self._lanes([lane] * LANES))

    def part(self, value: Value, start: int, lanes: int = LANES) -> Value:
        """Lanes start..start+lanes-1 of a wider vector."""
        undefined = ir.Constant(value.type, ir.Undefined)
        return self.builder.shuffle_vector(value, undefined, self._lanes(range(start, start + lanes)))

    def multiply(self, a: Value, b: Value) -> Value:
        """a * b in float32."""
        return self.builder.fmul(a, b)

    def negate(self, a: Value) -> Value:
        """-a in float32."""
        return self.builder.fneg(a)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once where the host has fused multiply-add."""
        name = f"llvm.fmuladd.v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "llvm.fmuladd.f32"
        kind = ir.FunctionType(a.type, (a.type,) * 3)
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        return self.builder.call(function, (a, b, c))

    def exp(self, x: Value) -> Value:
        """e ** x for x <= 0, within 2 units in the last place; results below 1.2e-38 become about that.

        x = n ln 2 + r with |r| <= ln 2 / 2; e**r by a polynomial, 2**n by writing the exponent (the classic Cephes
        expf, S. Moshier, 1992).
        """
        b = self.builder
        lowest = self.const(x, -87.0)
        x = b.select(b.fcmp_ordered(">", x, lowest), x, lowest)
        # Adding and taking away 1.5 * 2**23 rounds to the nearest integer.
        rounder = self.const(x, 12582912.0)
        n = b.fsub(self.multiply_add(x, self.const(x, 1.44269504088896341), rounder), rounder)
        r = self.multiply_add(n, self.const(x, -0.693359375), x)
        r = self.multiply_add(n, self.const(x, 2.12194440e-4), r)
        terms = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
        y = self.const(x, terms[0])
        for term in terms[1:]:
            y = self.multiply_add(y, r, self.const(x, term))
        y = b.fadd(self.multiply_add(y, b.fmul(r, r), r), self.const(x, 1.0))
        exponent = b.fptosi(n, vector(I32, x.type.count))
        return b.fmul(y, b.bitcast(self.shift_left(b.add(exponent, self.const(exponent, 127)), 23), x.type))

    def power_of_two(self, x: Value) -> Value:
        """2 ** x for x <= 0, within 2 units in the last place; results below 2 ** -125 become about that.

        x = n + r with |r| <= 1/2; 2**r by the polynomial with the smallest relative error, 2**n added to the exponent.
        """
        b = self.builder
        x = self.greater(x, self.const(x, -125.0))
        # As in exp; the sum's lowest bits are n as an integer.
        rounder = self.const(x, 12582912.0)
        rounded = b.fadd(x, rounder)
        r = b.fsub(x, b.fsub(rounded, rounder))
        terms = (1.3264727e-3, 9.6715131e-3, 5.5507337e-2, 2.4022242e-1, 6.9314698e-1, 1.0)
        y = self.const(x, terms[0])
        for term in terms[1:]:
            y = self.multiply_add(y, r, self.const(x, term))
        whole = vector(I32, x.type.count)
        return b.bitcast(b.add(b.bitcast(y, whole), self.shift_left(b.bitcast(rounded, whole), 23)), x.type)

    def greater(self, a: Value, b: Value) -> Value:
        """The larger of a and b, lane by lane."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def sum_lanes(self, value: Value) -> Value:
        """The sum over lanes, always as the same tree of halves."""
        while value.type.count > 1:
            half = value.type.count // 2
            value = self.builder.fadd(self.part(value, 0, half), self.part(value, half, half))
        return self.builder.extract_element(value, I32(0))

    @staticmethod
    def _lanes(indices: Sequence[int] | range) -> ir.Constant:
        return ir.Constant(vector(I32, len(indices)), list(indices))
