"""Panels: eight rows of weights side by side.

A panel block holds the bytes of one block of eight rows, no more and no less, in another order: first the 4-byte words
of the rows' quants and scales, word by word with the eight rows as lanes, then the float16 fields, then single bytes.
One 32-byte load so gives four neighbouring columns of eight rows, which is what isa.py multiplies. `read` turns a block
into groups of 32 columns; panel_formats.py, grid_panels.py, low_bit_panels.py and wide_panels.py have one for each
format.

Blocks whose bytes say little about single columns (indices into a grid, trits) are first recoded, row by row, into a
layout that does: `recode` writes it, and `words` and `halves` are offsets in it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llvmlite import ir

from engine.cpu.kernels.emit import F32, I8, I16, I32, I64, Emitter, Value, vector
from engine.cpu.kernels.isa import ACTIVATION_MAX, BYTES, ROWS, V8, V32, Isa
from engine.gguf.types import GGMLType

GROUP = 32
"""Columns of a group: a block of activations."""

HIGHEST_16 = 256 * 127
"""Largest magnitude of an activation of 16 bits."""

HIGHEST_14 = (1 << 13) - 1
"""The same of 14 bits: 32 products with weights as large fit into 32 bits."""

STEPS = GROUP // 4
"""Vectors of weights per group, where weights are bytes."""

WIDE_STEPS = GROUP // 2
"""The same where they are numbers of 16 bits."""

WIDE_BLOCK = 64
"""Columns of a block of these; widths of models are multiples of it, as a rule. Its power takes 0.8 % of its bytes."""

FLOATS = vector(F32, ROWS)


@dataclass(frozen=True)
class Group:
    """32 columns of eight rows: w = scale · factor · (q - offset) + m, or without factor.

    The offset is the panel's (Panel.offset), or 128 where signed weights have to be unsigned.

    Attributes:
        steps: 8 vectors of 32 bytes: q of four columns of each row; of wide panels 16 vectors, of two columns each.
        scales: 8 × f32 of all columns, or of the first and the last 16. One is the same for all groups of a block.
        factors: integers (8 × i32) of all columns, or of the first and the last 16, or nothing.
        mins: m (8 × f32) of all columns, or of the first and the last 16, or nothing.
    """

    steps: tuple[Value, ...]
    scales: tuple[Value, ...]
    factors: tuple[Value, ...] = ()
    mins: tuple[Value, ...] = ()


class Block:
    """A panel block at an address, while code that reads it is emitted."""

    def __init__(self, e: Emitter, panel: "Panel", isa: type[Isa], address: Value) -> None:
        self.e = e
        self.isa = isa
        self._panel = panel
        self.address = address

    def word(self, index: int) -> Value:
        """Word `index` of the eight rows, 8 × i32."""
        return self.e.load(self.address, V32, BYTES * index)

    def bits16(self, index: int) -> Value:
        """Field `index` of 16 bits, 8 × i16."""
        return self.e.load(self.address, vector(I16, ROWS), BYTES * len(self._panel.words) + 2 * ROWS * index)

    def half(self, index: int) -> Value:
        """The same read as float16, 8 × f32."""
        return self.e.half_to_float(self.bits16(index))

    def byte(self) -> Value:
        """The field of 8 bits, 8 × i32."""
        panel = self._panel
        start = BYTES * len(panel.words) + 2 * ROWS * len(panel.halves)
        return self.e.builder.zext(self.e.load(self.address, vector(I8, ROWS), start), V32)

    # Parts of words.
    def field(self, word: Value, shift: int, mask: int, up: int = 0) -> Value:
        """((each byte >> shift) & mask) << up, 32 bytes."""
        return self.e.builder.bitcast(self.e.move_bits(word, 0x01010101 * mask, shift, up), V8)

    def twos(self, first: int, quarter: int) -> tuple[Value, ...]:
        """Numbers of 2 bits of a group, a quarter of the 128 columns in the eight words from `first` on."""
        return tuple(self.field(self.word(first + i), 2 * quarter, 3) for i in range(STEPS))

    def pick(self, word: Value, index: int) -> Value:
        """Byte `index` of every word, 8 × i32."""
        return self.e.mask(self.e.shift_right(word, 8 * index), 0xFF)

    def pick_signed(self, word: Value, index: int) -> Value:
        """The same as a signed number."""
        return self.e.builder.ashr(self.e.shift_left(word, 24 - 8 * index), self.e.const(word, 24))

    def number(self, integers: Value) -> Value:
        """8 × i32 to 8 × f32."""
        return self.e.builder.sitofp(integers, FLOATS)

    def times(self, a: Value, b: Value | float) -> Value:
        """Product of floats; b may be a constant."""
        return self.e.multiply(a, self.e.const(a, float(b)) if isinstance(b, int | float) else b)

    def either(self, a: Value, b: Value) -> Value:
        """a | b."""
        return self.e.builder.or_(a, b)

    def signed(self, steps: tuple[Value, ...], scale: Value, *factors: Value) -> Group:
        """A group of signed weights; where they must be unsigned they are shifted by 128."""
        if self.isa.takes_signed:
            return Group(steps, (scale,), factors)
        top = ir.Constant(V8, [0x80] * BYTES)
        return Group(tuple(self.e.builder.xor(step, top) for step in steps), (scale,), factors)

    def groups(self) -> Iterator[Group]:
        """The block's groups. Products take away the offset, and multiply by factors, in integers."""
        return self._panel.read(self)


Read = Callable[[Block], Iterator[Group]]

Recode = Callable[[Emitter, Value, Value], None]
"""Emits code that reads the block at the first address and writes it in the panel's layout at the second."""


@dataclass(frozen=True)
class Panel:
    """How eight rows of one format are laid out and read.

    Attributes:
        name: of the format.
        block_size: columns of a block.
        type_size: bytes of a block of one row in the file.
        words: offsets of 4-byte words within it (where there is `recode`: within what that writes).
        halves: offsets of 2-byte fields.
        byte: offset of a single byte, or None.
        largest: largest magnitude of a weight as read (above 127: signed).
        n_scales, n_factors, n_mins: of each group.
        largest_factor: their largest magnitude.
        zero: the number q that means 0, in formats without minima.
        spread: index of the word of fifth bits, or None; see `spread_bits`.
        recode: brings a block into the layout that `words` and `halves` describe; None where it has it.
        copied: recoding blocks again in each product would take longer than products in float32.
        near: words are read in the order of addresses, so that the processor itself prefetches those far ahead.
        wide: weights are signed numbers of 16 bits, and multiplied with activations of 14.
        read: yields the block's groups in order.
    """

    name: str
    block_size: int
    type_size: int
    words: tuple[int, ...]
    halves: tuple[int, ...]
    byte: int | None
    largest: int
    n_scales: int
    n_factors: int
    n_mins: int
    largest_factor: int
    zero: int
    spread: int | None
    recode: Recode | None
    copied: bool
    near: bool
    wide: bool
    read: Read

    def offset(self, isa: type[Isa]) -> int:
        """What is taken away from every q, as `read` gives it for an instruction set."""
        if self.wide:
            return self.zero
        return 128 if self.largest > ACTIVATION_MAX and not isa.takes_signed else self.zero

    @property
    def has_halves(self) -> bool:
        """Whether the first and the last columns of a group are summed apart, or have minima of their own, in tiles."""
        return max(self.n_scales, self.n_mins) > 1 or (self.n_factors > 1 and not self.fits_bytes)

    @property
    def fits_bytes(self) -> bool:
        """Whether negated weights times the factors of their columns, if there are any, are bytes from -128 on.

        Q3_K's reach from -4 times 31 to -4 times -32, so the number that does not fit would be positive.
        """
        return self.n_factors > 0 and self._reach * self.largest_factor <= 128

    @property
    def _reach(self) -> int:
        """Largest magnitude of a weight, its offset taken away."""
        return self.largest if self.largest > ACTIVATION_MAX else max(self.zero, self.largest - self.zero)

    def n_sums(self, highest: int) -> int:
        """Sums of products, factors included, that a group needs to fit into 32 bits.

        highest: largest magnitude of an activation.
        """
        return 1 if self.largest_sum(highest) < 1 << 31 and self.n_scales == 1 else 2

    def largest_sum(self, highest: int) -> int:
        """Largest magnitude that the sum of a group's products can have, factors included.

        highest: as above.
        """
        return GROUP * self._reach * self.largest_factor * highest

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's block in a panel."""
        return 4 * len(self.words) + 2 * len(self.halves) + (self.byte is not None)

    @property
    def n_bytes(self) -> int:
        """Bytes of a panel block."""
        return ROWS * self.row_bytes

    @property
    def n_groups(self) -> int:
        """Groups of a block."""
        return self.block_size // GROUP


PANELS: dict[str, Panel] = {}
"""GGML type name -> panel. Filled by the files of formats beside this one."""


def panel(
    type: GGMLType,
    *,
    words: tuple[range, ...],
    halves: tuple[int, ...] = (),
    byte: int | None = None,
    largest: int,
    scales: int = 1,
    factors: int = 0,
    mins: int = 0,
    largest_factor: int = 1,
    zero: int = 0,
    spread: int | None = None,
    recode: Recode | None = None,
    copied: bool = False,
    near: bool = False,
    wide: bool = False,
) -> Callable[[Read], Read]:
    """Make a function the `read` of a type's panel; the arguments are explained at Panel."""
    places = tuple(place for part in words for place in part)

    def add(read: Read) -> Read:
        blocks = WIDE_BLOCK if wide else 1
        sizes = type.name, blocks * type.block_size, blocks * type.type_size
        numbers = largest, scales, factors, mins, largest_factor
        made = Panel(*sizes, places, halves, byte, *numbers, zero, spread, recode, copied, near, wide, read)
        assert recode is not None or made.row_bytes == type.type_size
        PANELS[type.name] = made
        return read

    return add


def pack_block(e: Emitter, panel: Panel, rows: list[Value], target: Value) -> None:
    """Writes the panel block of eight blocks at the addresses `rows`."""
    b = e.builder
    if panel.recode is not None:
        rows = _recoded(e, panel, rows)

    def gather(kind: ir.Type, offset: int, place: int) -> None:
        lanes = ir.Constant(vector(kind, ROWS), ir.Undefined)
        for lane, row in enumerate(rows):
            lanes = b.insert_element(lanes, e.load(row, kind, offset), I32(lane))
        if kind is I32 and place == BYTES * (panel.spread if panel.spread is not None else -1):
            lanes = spread_bits(e, lanes)
        e.store(lanes, target, place, align=1)

    place = 0
    for offset in panel.words:
        gather(I32, offset, place)
        place += BYTES
    for offset in panel.halves:
        gather(I16, offset, place)
        place += 2 * ROWS
    if panel.byte is not None:
        gather(I8, panel.byte, place)


def _recoded(e: Emitter, panel: Panel, rows: list[Value]) -> list[Value]:
    """Addresses of copies of blocks in the panel's layout.

    A function of its own recodes one block: written out eight times it would be most of a kernel.
    """
    assert panel.recode is not None
    name = f"recode_{panel.name}"
    function = e.builder.module.globals.get(name)
    if function is None:
        function = ir.Function(e.builder.module, ir.FunctionType(ir.VoidType(), (I64, I64)), name)
        function.linkage = "internal"
        inner = Emitter(ir.IRBuilder(function.append_basic_block()), native_half=e.native_half)
        panel.recode(inner, *function.args)
        inner.builder.ret_void()
    size = -(-panel.row_bytes // BYTES) * BYTES
    room = e.room(ROWS * size)
    copies = [e.at(room, size * lane) for lane in range(len(rows))]
    for row, copy in zip(rows, copies, strict=True):
        e.builder.call(function, (row, copy))
    return copies


def write_plane(e: Emitter, width: int, pieces: list[Value], target: Value, offset: int) -> None:
    """Writes numbers of `width` bits of a row, 16 bytes for 16 columns each, in the order in which K-quants have them.

    8 / width groups of 32 columns share 32 bytes, the first in the lowest bits.
    """
    sharing = 8 // width
    for first in range(0, len(pieces), 2 * sharing):
        for part in range(2):
            packed = pieces[first + part]
            for number in range(1, sharing):
                packed = e.either(packed, e.shift_left(pieces[first + 2 * number + part], width * number))
            e.store(packed, target, offset + GROUP * first // (2 * sharing) + 16 * part, align=1)


def spread_bits(e: Emitter, words: Value) -> Value:
    """Moves bit 4 s + c of each word (a bit of column 4 s + c) to bit s of byte c, where step s finds it."""
    b = e.builder
    result = e.const(words, 0)
    for step in range(STEPS):
        four = e.mask(e.shift_right(words, 4 * step), 15)
        # Multiplying by this number puts copies side by side, shifted so that byte c begins with bit c.
        spread = e.mask(b.mul(four, e.const(four, 0x00204081)), 0x01010101)
        result = b.or_(result, e.shift_left(spread, step))
    return result


def padded_rows(n_rows: int) -> int:
    """Rows rounded up to whole panels."""
    return -(-n_rows // ROWS) * ROWS
