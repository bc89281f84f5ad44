"""Sums of products of small integers, in the instructions of each kind of processor.

Everything here works on 8 lanes of four bytes: a lane is one row of weights, its bytes four neighbouring columns. The
columns' activations, four signed bytes, are the same in all lanes. An `Isa` adds such products up to one 32-bit number
per lane. The integers are exact, so every instruction set gives the same sums.

Independent of formats, scales and loops. Values are llvmlite IR values.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from engine.cpu.kernels.emit import I8, I16, I32, Emitter, Value, vector

ROWS = 8
"""Rows of weights side by side: 32-bit lanes of a 256-bit vector."""

BYTES = 4 * ROWS

ACTIVATION_MAX = 127
"""Largest magnitude of a quantized activation; -128 does not occur."""

BIAS = 128
"""What makes an activation of 8 bits an unsigned byte."""

Kind = Any
"""A vector type of llvmlite (the library carries no annotations)."""

V8, V16, V32 = vector(I8, BYTES), vector(I16, BYTES // 2), vector(I32, ROWS)


ASSEMBLER = {"llvm.x86.avx512.vpdpwssd.512": ("vpdpwssd $3, $2, $0", "=v,0,v,v")}
"""Intrinsics that LLVM must not replace. For Intel's processors it makes VPMADDWD and VPADDD of VPDPWSSD, which
shortens chains of additions; tiles, in which chains do not bind, take up to 1.6 times as long."""


def call(e: Emitter, name: str, result: Kind, *arguments: Value) -> Value:
    """Calls an LLVM intrinsic by its full name."""
    module = e.builder.module
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    if name in ASSEMBLER:
        return e.builder.asm(kind, *ASSEMBLER[name], arguments, False)
    return e.builder.call(module.globals.get(name) or ir.Function(module, kind, name), arguments)


class Isa:
    """One instruction set: how weights times activations are added up, a step of four columns at a time.

    A span of steps is added in the form that the instructions give; `finish` brings it to 32 bits.

    Args:
        e: where the instructions go.
        largest: largest magnitude of a weight; above 127 they are signed bytes.
    """

    takes_signed = True
    """Whether weights may be signed bytes. Unsigned ones below 128 are fine everywhere."""

    accumulator = V32

    sums_lanes = True
    """Whether accumulators are numbers of 32 bits, one for each row."""

    side = 1
    """Panels side by side in a vector, in tiles; everything above is for one."""

    multiplies_signed = True
    """Whether `add` takes any signed weights of its width, so that an offset may be part of them."""

    biased = False
    """Whether activations are unsigned bytes, BIAS more than they are. What that adds to a sum depends on weights
    alone, so that sums begin with its negative."""

    columns = 4
    """Columns of a step: bytes, or two numbers of 16 bits."""

    steps_at_once = 2
    """Steps per round of the innermost loop of tiles."""

    mnemonics: tuple[str, str] | None = None
    """Assembler of a multiplication and an addition, where tiles order them themselves (integer/tile_steps.py)."""

    multiplies_tokens = False
    """Whether tiles multiply TOKENS rows of activations at once, in registers of their own (integer/matrices.py)."""

    pairs_tokens = False
    """Whether tiles multiply two steps of two tokens at once. A vector of weights then has two steps of the first, or
    of the last four rows, and so an accumulator, row by row, the sums of both tokens."""

    def __init__(self, e: Emitter, largest: int) -> None:
        self._e = e
        self._largest = largest

    @classmethod
    def span(cls, steps: int, largest: int, zero: int) -> int:
        """Steps of weights 0 to `largest` that are added before the sum is brought to 32 bits: all, or a half, ...

        zero: the offset that `begin` takes away.
        """
        return steps

    @classmethod
    def for_tiles(cls, largest: int, *, halves: bool) -> "type[Isa]":
        """What is faster where weights are unpacked once for many products.

        largest: see above; halves: those of a group are summed apart, or have minima of their own.
        """
        return cls

    @classmethod
    def for_16_bits(cls, *, tiles: bool) -> "type[Isa]":
        """What multiplies activations of 16 bits: pairs of them (2 columns), or bytes, the upper and the lower (4)."""
        return cls

    @classmethod
    def of_one_panel(cls) -> "type[Isa]":
        """The same with vectors of one panel."""
        return cls

    @staticmethod
    def factor(e: Emitter, numbers: Value) -> Value:
        """Brings integer factors (8 × i32, within 16 bits) into the form that `finish` takes."""
        return numbers

    def begin(self, count: Value | None, offset: int, *, halves: bool, whole: bool = True) -> Value:
        """The accumulator before the first step of all that share a factor.

        Of weights q + offset the accumulator, or what `taken` gives, takes away offset times the sum of activations, so
        that what remains is the sum of q.

        count: that sum (8 × i32, only read where there is an offset).
        halves: it is two sums of 16 bits, of columns 0, 1, 4, 5, ... and in the upper half of the others.
        whole: the steps are one span.
        """
        if not offset:
            return self.zeros()
        b, e = self._e.builder, self._e
        if halves:
            sixteen = e.const(count, 16)
            count = b.add(b.ashr(count, sixteen), b.ashr(b.shl(count, sixteen), sixteen))
        return b.mul(count, e.const(count, -offset))

    @classmethod
    def zeros(cls) -> Value:
        """An accumulator of nothing."""
        return ir.Constant(cls.accumulator, [0] * cls.accumulator.count)

    def taken(self, count: Value | None, offset: int, factor: Value | None, *, whole: bool) -> Value | None:
        """What to add to the sums that `finish` gave (with that factor), 8 × i32, or None where `begin` did all.

        whole: see `begin`; counts have halves.
        """
        return None

    def add(self, total: Value, weights: Value, activations: Value) -> Value:
        """The accumulator after one more step: 32 bytes of weights times 32 bytes of activations."""
        raise NotImplementedError

    @staticmethod
    def bias(e: Emitter, total: Value, weights: Value) -> Value:
        """A sum of one panel (8 x i32) after BIAS times the weights of one more step, where activations are biased."""
        raise NotImplementedError

    def finish(self, total: Value, factor: Value | None) -> Value:
        """The sums of a span, times integer factors if there are any, 8 × i32."""
        return total if factor is None else self._e.builder.mul(total, factor)

    @staticmethod
    def look_up(e: Emitter, table: Sequence[int], indices: Value) -> Value:
        """32 bytes of a table of 16, by indices below 16."""
        return e.look_up(table, indices)


class Portable(Isa):
    """Plain vector code, for which LLVM chooses instructions of the processor."""

    @classmethod
    def for_16_bits(cls, *, tiles: bool) -> type[Isa]:
        """See Isa.for_16_bits."""
        return PortablePairs

    def add(self, total: Value, weights: Value, activations: Value) -> Value:
        """See Isa.add."""
        b = self._e.builder
        products = b.mul(b.sext(weights, vector(I16, BYTES)), b.sext(activations, vector(I16, BYTES)))
        return b.add(total, self._pairs(self._pairs(b.sext(products, vector(I32, BYTES)))))

    def _pairs(self, values: Value) -> Value:
        """Sums of neighbouring lanes."""
        undefined = ir.Constant(values.type, ir.Undefined)
        count = values.type.count
        even, odd = (
            self._e.builder.shuffle_vector(values, undefined, ir.Constant(vector(I32, count // 2), list(lanes)))
            for lanes in (range(0, count, 2), range(1, count, 2))
        )
        return self._e.builder.add(even, odd)


class PortablePairs(Portable):
    """The same with two numbers of 16 bits a lane."""

    columns = 2

    def add(self, total: Value, weights: Value, activations: Value) -> Value:
        """See Isa.add; both operands are 16 × i16."""
        b, wide = self._e.builder, vector(I32, 2 * ROWS)
        return b.add(total, self._pairs(b.mul(b.sext(weights, wide), b.sext(activations, wide))))


class Neon(Isa):
    """ARM's SDOT: four signed bytes times four signed bytes, added to a 32-bit lane."""

    def add(self, total: Value, weights: Value, activations: Value) -> Value:
        """See Isa.add."""
        e = self._e
        halves = [
            call(
                e,
                "llvm.aarch64.neon.sdot.v4i32.v16i8",
                vector(I32, 4),
                e.part(total, start // 4, 4),
                e.part(weights, start, 16),
                e.part(activations, start, 16),
            )
            for start in (0, 16)
        ]
        return e.builder.shuffle_vector(halves[0], halves[1], ir.Constant(V32, list(range(ROWS))))

    @staticmethod
    def look_up(e: Emitter, table: Sequence[int], indices: Value) -> Value:
        """See Isa.look_up: TBL."""
        half = vector(I8, 16)
        numbers = ir.Constant(half, [number & 0xFF for number in table])
        halves = [call(e, "llvm.aarch64.neon.tbl1.v16i8", half, numbers, e.part(indices, at, 16)) for at in (0, 16)]
        return e.builder.shuffle_vector(halves[0], halves[1], ir.Constant(vector(I32, BYTES), list(range(BYTES))))


class I8mm(Neon):
    """SMMLA in tiles with activations of 8 bits; all else as Neon."""

    @classmethod
    def for_tiles(cls, largest: int, *, halves: bool) -> type[Isa]:
        """See Isa.for_tiles."""
        return I8mmTiles


class I8mmTiles(Neon):
    """ARM's SMMLA: eight signed bytes of two rows times those of two tokens, added to four numbers."""

    pairs_tokens = True

    def add(self, total: Value, weights: Value, activations: Value) -> Value:
        """See Isa.add; weights are eight columns of four rows, activations those of two tokens."""
        e = self._e
        halves = [
            call(
                e,
                "llvm.aarch64.neon.smmla.v4i32.v16i8",
                vector(I32, 4),
                e.part(total, start // 4, 4),
                e.part(weights, start, 16),
                activations,
            )
            for start in (0, 16)
        ]
        return e.builder.shuffle_vector(halves[0], halves[1], ir.Constant(V32, list(range(ROWS))))


class Avx2(Isa):
    """VPMADDUBSW: unsigned times signed bytes, neighbours added to 16 bits.

    A span has as many steps as 16 bits can hold; then VPMADDWD adds neighbours to 32 bits and applies the factor.
    The sign of signed weights is first moved to the activations, because the instruction takes unsigned weights.
    """

    accumulator = V16
    sums_lanes = multiplies_signed = False
    mnemonics: tuple[str, str] | None = ("vpmaddubsw", "vpaddw")

    def begin(self, count: Value | None, offset: int, *, halves: bool, whole: bool = True) -> Value:
        """See Isa.begin: offsets are taken away in 16 bits, where overflow of what is in between does no harm."""
        if not offset or not whole:
            return self.zeros()
        assert halves, "of 16 bits there are other instructions"
        return self._e.builder.mul(self._e.builder.bitcast(count, V16), _all_16(-offset))

    def taken(self, count: Value | None, offset: int, factor: Value | None, *, whole: bool) -> Value | None:
        """See Isa.taken."""
        if not offset or whole:
            return None
        by = _all_16(-offset)
        return Avx2.finish(
            self, self._e.builder.bitcast(count, V16), by if factor is None else self._e.builder.mul(factor, by)
        )

    @classmethod
    def span(cls, steps: int, largest: int, zero: int) -> int:
        """See Isa.span: sums of 16 bits wrap around, so only what is left without the offset has to fit into them."""
        if largest > ACTIVATION_MAX:
            return 1
        per_step = 2 * ACTIVATION_MAX
        if zero and steps * per_step * max(zero, largest - zero) < 1 << 15:
            return steps
        while steps * per_step * largest >= 1 << 15:
            steps //= 2
        return steps

    @classmethod
    def for_tiles(cls, largest: int, *, halves: bool) -> type[Isa]:
        """See Isa.for_tiles: as 16 bits, signed weights need no moving of signs."""
        return Avx2Wide if largest > ACTIVATION_MAX else cls

    @classmethod
    def for_16_bits(cls, *, tiles: bool) -> type[Isa]:
        """See Isa.for_16_bits: VPMADDUBSW would need as many instructions, and more to join halves."""
        return Avx2Wide

    @staticmethod
    def factor(e: Emitter, numbers: Value) -> Value:
        """See Isa.factor: both 16-bit halves of a lane hold it."""
        b = e.builder
        return b.bitcast(b.or_(e.mask(numbers, 0xFFFF), e.shift_left(numbers, 16)), V16)

    def add(self, total: Value, weights: Value, activations: Value) -> Value:
        """See Isa.add."""
        e = self._e
        if self._largest > ACTIVATION_MAX:
            activations = call(e, "llvm.x86.avx2.psign.b", V8, activations, weights)
            weights = call(e, "llvm.x86.avx2.psign.b", V8, weights, weights)  # magnitudes, 128 as unsigned
        return e.builder.add(total, call(e, "llvm.x86.avx2.pmadd.ub.sw", V16, weights, activations))

    def finish(self, total: Value, factor: Value | None) -> Value:
        """See Isa.finish."""
        return call(self._e, "llvm.x86.avx2.pmadd.wd", V32, total, _all_16(1) if factor is None else factor)

    @staticmethod
    def look_up(e: Emitter, table: Sequence[int], indices: Value) -> Value:
        """See Isa.look_up: VPSHUFB, which has one table per half of a vector."""
        numbers = ir.Constant(V8, [number & 0xFF for number in (*table, *table)])
        return call(e, "llvm.x86.avx2.pshuf.b", V8, numbers, indices)


class Avx2Wide(Avx2):
    """VPMADDWD: two signed numbers of 16 bits each, added to a 32-bit lane.

    On Zen 3, where only two of four units multiply or change signs, 8 instructions of VPMADDWD and VPADDD take 2 cycles
    and do what takes Avx2 3.25 cycles.
    """

    accumulator = V32
    sums_lanes = multiplies_signed = True
    columns = 2
    mnemonics: tuple[str, str] | None = ("vpmaddwd", "vpaddd")

    factor = staticmethod(Isa.factor)

    def begin(self, count: Value | None, offset: int, *, halves: bool, whole: bool = True) -> Value:
        """See Isa.begin."""
        return Isa.begin(self, count, offset, halves=halves)

    def taken(self, count: Value | None, offset: int, factor: Value | None, *, whole: bool) -> Value | None:
        """See Isa.taken."""
        return None

    @classmethod
    def span(cls, steps: int, largest: int, zero: int) -> int:
        """See Isa.span."""
        return steps

    def add(self, total: Value, weights: Value, activations: Value) -> Value:
        """See Isa.add; both operands are 16 × i16."""
        return self._e.builder.add(total, call(self._e, "llvm.x86.avx2.pmadd.wd", V32, weights, activations))

    def finish(self, total: Value, factor: Value | None) -> Value:
        """See Isa.finish."""
        return Isa.finish(self, total, factor)


def _all_16(number: int) -> Value:
    return ir.Constant(V16, [number] * V16.count)


class Vnni(Isa):
    """VPDPBUSD: four unsigned times four signed bytes, added to a 32-bit lane."""

    takes_signed = multiplies_signed = False

    # A group without a loop: 161 instead of 159 GMAC/s (Q4_0) on a core of Zen 4, and half of one, where halves have
    # scales, 122 instead of 111; AVX2's longer steps lose 6 % by it.
    steps_at_once = 8

    @classmethod
    def for_16_bits(cls, *, tiles: bool) -> type[Isa]:
        """See Isa.for_16_bits: as many instructions either way. Pairs need no joining, and weights as 16 bits."""
        return VnniWide if tiles else cls

    def begin(self, count: Value | None, offset: int, *, halves: bool, whole: bool = True) -> Value:
        """See Isa.begin: VPDPWSSD adds halves."""
        if not offset or not halves:
            return super().begin(count, offset, halves=halves)
        pairs = vector(I16, 2 * self.accumulator.count)
        return _dot(self._e, "vpdpwssd", self.zeros(), count, ir.Constant(pairs, [-offset] * pairs.count))

    def add(self, total: Value, weights: Value, activations: Value) -> Value:
        """See Isa.add."""
        return _dot(self._e, "vpdpbusd", total, weights, activations)

    look_up = staticmethod(Avx2.look_up)

    @classmethod
    def for_tiles(cls, largest: int, *, halves: bool) -> type[Isa]:
        """See Isa.for_tiles."""
        return VnniTiles


class VnniWide(Avx2Wide):
    """VPDPWSSD: VPMADDWD with its addition."""

    steps_at_once = 8
    mnemonics = None

    def add(self, total: Value, weights: Value, activations: Value) -> Value:
        """See Isa.add; both operands are 16 × i16."""
        return _dot(self._e, "vpdpwssd", total, weights, activations)


def _dot(e: Emitter, name: str, total: Value, weights: Value, activations: Value) -> Value:
    """One of VNNI's instructions, as wide as its operands."""
    numbers = (e.builder.bitcast(part, total.type) for part in (weights, activations))
    return call(e, f"llvm.x86.avx512.{name}.{32 * total.type.count}", total.type, total, *numbers)


class VnniTiles(Vnni):
    """Tiles: VPDPBUSD of unsigned activations and signed weights, which so need no offset."""

    takes_signed = multiplies_signed = biased = True

    def add(self, total: Value, weights: Value, activations: Value) -> Value:
        """See Isa.add."""
        return _dot(self._e, "vpdpbusd", total, activations, weights)

    @staticmethod
    def bias(e: Emitter, total: Value, weights: Value) -> Value:
        """See Isa.bias."""
        return _dot(e, "vpdpbusd", total, ir.Constant(V8, [BIAS] * BYTES), weights)


class Vnni512(Vnni):
    """The same with vectors of 64 bytes in tiles.

    A core of Zen 4 multiplies as much either way, but has half as many other instructions (Q6_K 130 and 150 GMAC/s);
    Intel's server cores multiply twice as much.
    """

    @classmethod
    def for_tiles(cls, largest: int, *, halves: bool) -> type[Isa]:
        """See Isa.for_tiles."""
        return VnniTiles512

    @classmethod
    def for_16_bits(cls, *, tiles: bool) -> type[Isa]:
        """See Vnni.for_16_bits."""
        return VnniWide512 if tiles else Vnni


class VnniTiles512(VnniTiles):
    """Tiles of Vnni512."""

    accumulator = vector(I32, 2 * ROWS)
    side = 2


class VnniWide512(VnniWide):
    """The same with activations of 16 bits."""

    accumulator = vector(I32, 2 * ROWS)
    side = 2

    @classmethod
    def of_one_panel(cls) -> type[Isa]:
        """See Isa.of_one_panel."""
        return VnniWide


class Amx(Vnni512):
    """AMX in tiles with activations of 8 bits; all else as Vnni512."""

    @classmethod
    def for_tiles(cls, largest: int, *, halves: bool) -> type[Isa]:
        """See Isa.for_tiles: floats of halves take most of the time, so AMX loses there (Q6_K 179, not 215 GMAC/s)."""
        return VnniTiles512 if halves else AmxTiles


class AmxTiles(Isa):
    """TDPBSSD: signed bytes of 16 tokens times signed bytes of 16 rows of weights, added to 16 x 16 numbers."""

    accumulator = vector(I32, 2 * ROWS)
    side = 2
    multiplies_tokens = True

    look_up = staticmethod(Avx2.look_up)


ISAS: dict[str, type[Isa]] = {
    "amx": Amx,
    "vnni512": Vnni512,
    "vnni": Vnni,
    "avx2": Avx2,
    "i8mm": I8mm,
    "neon": Neon,
    "portable": Portable,
}
"""By the name that settings use, best first."""
