"""What the parts of the attention kernel share while its code is emitted: sizes, operands, and one item's addresses.

An item is one token and neighbouring heads of keys. Layout of the scratch and the order of loops are decided here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from numba.core import cgutils

from engine.config import KV_BLOCK, PAGE
from engine.cpu.kernels.emit import F32, F64, I8, I16, I64, LANES, Emitter, Value, vector

HEADS = 4
"""Most query heads that are multiplied together: converting float16 takes as long as multiplying, so heads share it."""


@dataclass(frozen=True)
class Registers:
    """How an instruction set's registers are used.

    Attributes:
        width: floats per vector.
        parts: vectors of the cache that are multiplied with three or four heads, and then with as many as are left.
        two: the same with two heads.
        alone: the same with one.
    """

    width: int
    parts: tuple[int, ...]
    two: tuple[int, ...]
    alone: tuple[int, ...]

    def pieces(self, n_heads: int, n_vectors: Value, b: Any) -> list[tuple[int, Value]]:
        """How n_vectors vectors are taken: so many together, how often."""
        sizes = self.alone if n_heads == 1 else self.two if n_heads == 2 else self.parts
        if sizes == (3, 2):  # threes and at most two twos
            twos = b.srem(b.mul(n_vectors, I64(2)), I64(3))
            return [(3, b.sdiv(b.sub(n_vectors, b.mul(twos, I64(2))), I64(3))), (2, twos)]
        found = []
        for size in sizes:
            found.append((size, b.sdiv(n_vectors, I64(size))))
            n_vectors = b.srem(n_vectors, I64(size))
        return found


FEW, MANY = Registers(8, (3, 2), (4, 2), (8, 2)), Registers(16, (4, 2, 1), (4, 2, 1), (4, 2, 1))
"""Of AVX2: 12 sums, and the 4 registers left are in use, too. Eight sums would just cover the latency of a
multiplication; the other four cover further delays. Of AVX-512: 16 sums of twice the width."""

HEAD_FLOATS = PAGE + 2 * LANES
"""Floats of scratch per query head: scores of a page, then partial sums of weights and two numbers of the softmax."""

SUMS, LARGEST, CORRECTION = (4 * PAGE, 4 * (PAGE + LANES), 4 * (PAGE + LANES + 1))
"""Bytes before these: partial sums, the largest score so far times log2(e), the factor on earlier sums."""

LOG2_E = 1.4426950408889634

COLUMNS = 4
"""Columns of keys per round of the innermost loop; widths are multiples of it."""

LINE, LEVEL = 64, 2
"""Bytes that one prefetch brings, and into which cache: a core has far more of them in flight to the second level than
to the first. Two cores of Zen 4 read 4096 positions of 16 layers of the 1B shape in 3.8 ms with it, and in 5.4."""


@dataclass(frozen=True)
class Operands:
    """Of the kernel, in this order.

    q float32 (T, H, Hd) and out (T, H, Hv) without gaps; keys (N, K, Hd, PAGE) and values (N, K, PAGE, Hv) without
    gaps, both widths multiples of 16, or of KV_BLOCK in a cache of 8 bits, where scales float16 (width / KV_BLOCK,
    PAGE) follow the page of each head; rows: int64 (T, 2), for each token the address of its sequence's table of pages,
    whose int64 entry i has the positions from i * PAGE on, and its position; scale: a float64; by_token: 1 or 0, the
    order of items; window: keys that a query sees; softcap: a float64, or 0; sinks and slopes: float32 (H,), or 0;
    n_keys: where queries also see `window` - 1 keys behind them, how many keys there are, else 0; activations: where
    out is written as well, quantized in that form (../integer/activations.py), if the heads of an item are a multiple
    of 32 floats; else 0.
    """

    q: Value
    keys: Value
    values: Value
    out: Value
    rows: Value
    n_kv_heads: Value
    scale: Value
    n_tokens: Value
    n_heads: Value
    key_width: Value
    value_width: Value
    by_token: Value
    window: Value
    softcap: Value
    sinks: Value
    slopes: Value
    n_keys: Value
    activations: Value
    form: Value


class Item:
    """One token and neighbouring heads of keys, while their code is emitted."""

    def __init__(
        self,
        e: Emitter,
        o: Operands,
        token: Value,
        heads: tuple[Value, Value],
        scratch: Value,
        kv_type: str,
        registers: Registers,
    ) -> None:
        b = e.builder
        self.registers, self.width, self.floats = registers, registers.width, vector(F32, registers.width)
        self.e, self.b, self.o, self.kv_type = e, b, o, kv_type
        self.scaled = kv_type == "Q8_0"
        self.size = {"F32": 4, "F16": 2, "Q8_0": 1}[kv_type]
        self.group = b.sdiv(o.n_heads, o.n_kv_heads)
        # With their share of the scales, which follow the page of a head.
        self.key_bytes, self.value_bytes = (self._row_bytes(width) for width in (o.key_width, o.value_width))
        self.value_stride = b.mul(o.value_width, I64(self.size))
        self.token, (self.first_kv_head, self.n_kv_heads), self.scratches = token, heads, scratch
        row = self.at(o.rows, token, 16)
        self.pages, self.place = (e.load(row, I64, offset, align=8) for offset in (0, 8))
        after = b.add(self.place, I64(1))
        begin = b.sub(after, o.window)
        self.begin = b.select(b.icmp_signed(">", begin, I64(0)), begin, I64(0))
        later = b.add(self.place, o.window)
        later = b.select(b.icmp_signed("<", later, o.n_keys), later, o.n_keys)
        self.end = b.select(b.icmp_signed("==", o.n_keys, I64(0)), after, later)
        self.cap = b.fptrunc(b.bitcast(o.softcap, F64), F32)
        scale = b.bitcast(o.scale, F64)
        self.scale = b.fptrunc(scale, F32)
        # Weights are powers of two, scores multiplied by log2(e): at once by that and by the scale, unless something
        # comes between.
        self.plain = b.and_(b.icmp_signed("==", o.slopes, I64(0)), b.fcmp_ordered("==", self.cap, F32(0.0)))
        at_once = b.fptrunc(b.fmul(scale, F64(LOG2_E)), F32)
        self.factor = b.select(self.plain, at_once, b.fptrunc(F64(LOG2_E), F32))

    def _row_bytes(self, width: Value) -> Value:
        """Bytes of a position of one head."""
        scales = self.b.mul(self.b.sdiv(width, I64(KV_BLOCK)), I64(2 if self.scaled else 0))
        return self.b.add(self.b.mul(width, I64(self.size)), scales)

    def scales(self, page: Value, width: Value, block: Value) -> Value:
        """Address of the scales, float16 (PAGE,), of a block of columns of a head's page."""
        return self.at(page, self.b.add(width, self.b.mul(block, I64(2))), PAGE)

    def load_scales(self, address: Value, part: int) -> Value:
        """Vector `part` of them as float32."""
        return self.e.half_to_float(self.e.load(address, vector(I16, self.width), 2 * self.width * part))

    def at(self, base: Value, index: Value, size: Value | int) -> Value:
        """The address base + index * size."""
        return self.b.add(base, self.b.mul(index, I64(size) if isinstance(size, int) else size))

    def head_scratch(self, head: Value) -> Value:
        """The scratch of a query head."""
        return self.at(self.scratch, head, 4 * HEAD_FLOATS)

    @contextmanager
    def kv_heads(self) -> Iterator[Value]:
        """A loop over the heads of keys; gives the number of the head that the queries and results belong to."""
        b, o = self.b, self.o
        with cgutils.for_range(b, self.n_kv_heads) as heads:
            self.first_head = b.mul(b.add(self.first_kv_head, heads.index), self.group)
            place = b.add(b.mul(self.token, o.n_heads), self.first_head)
            self.q = self.at(o.q, b.mul(place, o.key_width), 4)
            self.out = self.at(o.out, b.mul(place, o.value_width), 4)
            self.scratch = self.at(self.scratches, b.mul(heads.index, self.group), 4 * HEAD_FLOATS)
            yield heads.index

    def page(self, index: Value) -> tuple[Value, Value, Value]:
        """Addresses of the first head's keys and values of the page at place `index`, and of the next page's keys.

        Pages may be anywhere in memory, so the processor cannot predict which lines come next.
        """
        b, o = self.b, self.o
        last = b.sdiv(b.sub(self.end, I64(1)), I64(PAGE))
        following = b.add(index, I64(1))
        following = b.select(b.icmp_signed("<", following, last), following, last)
        pages = (self.e.load(self.at(self.pages, place, 8), I64, align=8) for place in (index, following))
        heads = [b.add(b.mul(page, o.n_kv_heads), self.first_kv_head) for page in pages]
        here, there = (b.mul(head, I64(PAGE)) for head in heads)
        keys, next_keys = (self.at(o.keys, row, self.key_bytes) for row in (here, there))
        return keys, self.at(o.values, here, self.value_bytes), next_keys

    def each(self, compute: Callable[[list[Value]], None]) -> None:
        """Emits `compute` for HEADS heads at a time, and again for one, two and three that may be left."""
        b = self.b
        together = b.sdiv(self.group, I64(HEADS))
        with cgutils.for_range(b, together) as several:
            first = b.mul(several.index, I64(HEADS))
            compute([b.add(first, I64(i)) for i in range(HEADS)])
        done = b.mul(together, I64(HEADS))
        left = b.sub(self.group, done)
        for count in range(1, HEADS):
            with b.if_then(b.icmp_signed("==", left, I64(count))):
                compute([b.add(done, I64(i)) for i in range(count)])

    def load(self, address: Value, offset: int = 0) -> Value:
        """A vector of the cache as float32, of 8 bits before it is scaled."""
        if self.scaled:
            return self.e.signed_to_float(self.e.load(address, vector(I8, self.width), offset))
        if self.kv_type == "F16":
            return self.e.half_to_float(self.e.load(address, vector(I16, self.width), offset))
        return self.e.load(address, self.floats, offset, align=4)

    def prefetch(self, share: Value, index: Value, n_bytes: int) -> None:
        """Prefetches bytes index * n_bytes .. (index + 1) * n_bytes of what is read after this.

        Each loop over a part of a page prefetches as large a part of what follows, line after line: a processor cannot
        have all of them in flight at once.
        """
        place = self.at(share, index, n_bytes)
        for offset in range(0, n_bytes, LINE):
            self.e.prefetch(self.e.at(place, offset), LEVEL)

    def of_head(self, table: Value, head: Value) -> Value:
        """A head's entry of a float32 table, 0 where there is no table."""
        b, place = self.b, self.b.add(self.first_head, head)
        entry = cgutils.alloca_once(b, F32)
        b.store(F32(0.0), entry)
        with b.if_then(b.icmp_signed("!=", table, I64(0))):
            b.store(self.e.load(self.at(table, place, 4), F32, align=4), entry)
        return b.load(entry)


class segments:
    """A loop over the runs of neighbouring positions that an item sees, page by page.

    Gives: the page's place in the table, its first and last position + 1 that are seen.
    """

    def __init__(self, item: Item) -> None:
        b = item.b
        self._item = item
        self._first_page = b.sdiv(item.begin, I64(PAGE))
        last_page = b.sdiv(b.sub(item.end, I64(1)), I64(PAGE))
        self._loop = cgutils.for_range(b, b.add(b.sub(last_page, self._first_page), I64(1)))

    def __enter__(self) -> tuple[Value, Value, Value]:
        item, b = self._item, self._item.b
        page = b.add(self._first_page, self._loop.__enter__().index)
        start = b.mul(page, I64(PAGE))
        begin = b.select(b.icmp_signed(">", item.begin, start), item.begin, start)
        end = b.add(start, I64(PAGE))
        end = b.select(b.icmp_signed("<", item.end, end), item.end, end)
        return page, b.sub(begin, start), b.sub(end, start)

    def __exit__(self, *error: object) -> None:
        self._loop.__exit__(*error)
