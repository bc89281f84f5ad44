"""Writes down which kernel reads what during a forward pass, instead of computing it.

program.py runs what was recorded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engine.config import PAGE
from engine.cpu import reference
from engine.cpu.caches.rows import CacheRows
from engine.cpu.kernels import build
from engine.cpu.kernels.attention import attend as attend_kernel
from engine.cpu.kernels.integer.activations import Form
from engine.cpu.kernels.integer.panels import GROUP
from engine.cpu.kernels.machine import HEADER, REGIONS, ROW, Head
from engine.cpu.memory import aligned_empty
from engine.cpu.products.integer import Activations, IntegerWeights, empty_activations
from engine.cpu.products.matmul import LANES, Epilogue, dot_kind, dot_operands, prepare
from engine.cpu.steps.operands import (
    address,
    columns_step,
    embed_rows,
    gate_step,
    integer_step,
    normalize_step,
    quantize_step,
    rotate_step,
    score_settings,
)
from engine.cpu.steps.protocol import Angles, FindRows, Finish, Float32Array, Int32Array, Pages, Step
from engine.cpu.threads import ThreadPool
from engine.model.batch import Batch
from engine.model.config import Activation, AttentionTemperature
from engine.model.rope import RopeTable
from engine.model.weights import LayerWeights, Linear, Norm, Weight

CHUNK_FLOATS = 1 << 14
"""Least weights per chunk of a product: 3 us of work, many times what taking a chunk costs."""

PER_FLOAT = 3
"""Products in integers that take the time of one of floats."""

CHUNKS_PER_THREAD = 8

Place = tuple[int, int]
"""Where an array is in memory, and its bytes: equal for every view of all of it."""


class Recorder:
    """Steps that are recorded. Results are buffers that every run of the program fills again.

    Attributes:
        regions: of the program's rows at most (kernels/machine.py).
    """

    def __init__(self, pool: ThreadPool, weights: IntegerWeights | None = None, *, rounded: bool = False) -> None:
        self._pool = pool
        self.regions = min(pool.threads, REGIONS)
        self._integer = weights
        self._rounded = rounded
        self._quantized: dict[Place, dict[Form, Activations]] = {}  # of what is in memory now
        self._rooms: dict[tuple[Place, int, Form], Activations] = {}  # by the rows as well
        self._writers: dict[Place, tuple[int, Step]] = {}  # row of the program and step that wrote it
        self.rows: list[tuple[int, ...]] = []
        self.fills: list[Callable[[Batch], None]] = []
        self.scratch_floats = 16
        self._waits: dict[int, int] = {}
        self._first = 0
        self._alive: list[object] = []  # whose memory the program reads and writes
        self._buffers: dict[tuple[str, tuple[int, ...]], Float32Array] = {}

    def join(self) -> None:
        """See Steps.join."""
        if len(self.rows) > self._first:
            self._waits[len(self.rows) - 1] = len(self.rows) - self._first
            self._first = len(self.rows)

    def table(self) -> npt.NDArray[np.int64]:
        """The program, one row per step."""
        table = np.zeros((len(self.rows), ROW), dtype=np.int64)
        for index, row in enumerate(self.rows):
            table[index, : len(row)] = row
            regions = min(row[Head.CHUNKS], self.regions)
            table[index, Head.REGIONS], table[index, Head.CHUNKS] = regions, row[Head.CHUNKS] // regions
            table[index, Head.WAITS] = self._waits.get(index, 0)
        return table

    def empty(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """See Steps.empty."""
        buffer = self._buffers.setdefault((name, shape), aligned_empty(*shape))
        self._forget(buffer)
        return buffer

    def embed(self, name: str, table: Weight, batch: Batch, finish: Finish) -> Float32Array:
        """See Steps.embed."""
        out = self.empty(name, (batch.n_tokens, table.columns))

        def fill(batch: Batch) -> None:
            embed_rows(table, batch.token_ids, out)
            finish(out, batch)

        self.fills.append(fill)
        return out

    def angles(self, rope: RopeTable, positions: Int32Array) -> Angles:
        """See Steps.angles."""
        cos, sin = (np.empty((len(positions), len(rope.inv_freq)), dtype=np.float32) for _ in range(2))
        kept = KeptAngles(rope)

        def fill(batch: Batch) -> None:
            if len(batch.positions) == 1:
                cos[0], sin[0] = kept.of(int(batch.positions[0]))
            else:
                cos[...], sin[...] = rope.cos_sin(batch.positions)

        self.fills.append(fill)
        return Angles(cos, sin, rope.style)

    def cache_rows(self, batch: Batch, tables: npt.NDArray[np.int64], chunk: int | None = None) -> CacheRows:
        """See Steps.cache_rows."""
        assert chunk is None, "no kernel is recorded for layers that attend in chunks"
        rows = CacheRows.of(batch, tables)
        self.fills.append(rows.fill)
        return rows

    def factors(self, temperature: AttentionTemperature, positions: Int32Array) -> Float32Array:
        """See Steps.factors."""
        out = np.empty(len(positions), dtype=np.float32)

        def fill(batch: Batch) -> None:
            out[...] = reference.temperature_factors(batch.positions, temperature)

        self.fills.append(fill)
        return out

    def normalize(
        self, name: str, x: Float32Array, norm: Norm, residual: Float32Array | None = None, factor: float = 1.0
    ) -> Float32Array:
        """See Steps.normalize."""
        out = self.empty(name, x.shape)
        self._write(normalize_step(x, norm, out, residual, factor), out)
        return out

    def linear(self, name: str, x: Float32Array, linear: Linear, residual: Float32Array | None = None) -> Float32Array:
        """See Steps.linear."""
        weight = prepare(linear.weight, rounded=self._rounded)
        out = self.empty(name, (len(x), weight.rows))
        assert residual is not out
        if self._integer is not None and self._integer.takes(weight):
            activations = self._activations(x, self._integer.form(weight, len(x)))
            self._write(integer_step(self._integer, activations, linear, weight, out, residual, PER_FLOAT), out)
            return out
        operands = dot_operands(x, weight, out, Epilogue(linear.scale, linear.bias, residual))
        floats = weight.rows * weight.columns * len(x)
        self._write(Step(dot_kind(len(x)), weight.kernel_type, operands, weight.rows, floats), out)
        return out

    def rotate_store(
        self,
        x: Float32Array,
        rows: CacheRows,
        angles: Angles | None,
        cache: Pages,
        *,
        factors: Float32Array | None = None,
        store: bool = True,
    ) -> None:
        """See Steps.rotate_store."""
        self._write(rotate_step(x, rows, angles, cache, factors, store), x)

    def attend(
        self,
        out: Float32Array,
        q: Float32Array,
        rows: CacheRows,
        cache: tuple[Pages, Pages],
        layer: LayerWeights,
    ) -> None:
        """See Steps.attend."""
        keys, values = cache
        operands = attend_kernel.operands(q, keys, values, rows, out, **score_settings(layer))
        n_rows, n_heads, n_kv_heads = len(q), q.shape[1], keys.shape[1]
        self.scratch_floats = max(self.scratch_floats, n_heads * attend_kernel.HEAD_FLOATS)
        # Of a single row one chunk per thread: one thread reads neighbouring heads faster.
        chunks = self._pool.threads * (1 if n_rows == 1 else CHUNKS_PER_THREAD)
        unit = n_heads // n_kv_heads * values.shape[3]
        type_name = attend_kernel.TYPES[keys.dtype]
        self._write(Step("attend", type_name, operands, n_kv_heads * n_rows, chunks * CHUNK_FLOATS, unit), out)

    def gate(self, x: Float32Array, y: Float32Array | None, activation: Activation | None) -> Float32Array:
        """See Steps.gate."""
        self._write(gate_step(x, y, activation), x)
        return x

    def take_columns(self, name: str, x: Float32Array, first: int, width: int) -> Float32Array:
        """See Steps.take_columns."""
        out = self.empty(name, (len(x), x.shape[1] * width))
        self._write(columns_step(x, first, width, out), out)
        return out

    def state_rows(self, batch: Batch, find: FindRows) -> npt.NDArray[np.int64]:
        """See Steps.state_rows."""
        rows = find(batch)

        def fill(batch: Batch) -> None:
            rows[...] = find(batch)

        self.fills.append(fill)
        return rows

    def recur(self, step: Step, out: Float32Array, *alive: object) -> None:
        """See Steps.recur."""
        self._alive.append((out, alive))
        self._write(step, out)

    def _activations(self, x: Float32Array, form: Form) -> Activations:
        """The rows of an array in integers: by the step that writes it, where it can, else by one of their own."""
        place = _place(x)
        known = self._quantized.setdefault(place, {})
        if form not in known:
            room = place, len(x), form
            found = self._rooms.setdefault(room, empty_activations(len(x), x.shape[1], form))
            if known or not self._write_both(x, found, form):  # a step writes one form
                self._write(quantize_step(x, found, form))
                self.join()
            known[form] = found
        return known[form]

    def _write_both(self, x: Float32Array, activations: Activations, form: Form) -> bool:
        """Let the step that wrote a buffer write its activations, too; False where that is not possible."""
        index, step = self._writers.get(_place(x), (0, None))
        if step is None or not step.unit or step.unit % GROUP:
            return False
        row = list(self.rows[index])
        end = HEADER + len(step.operands)
        row[end - 2 : end] = address(activations), form
        if step.kind == "gate":  # whose items are then twice as large
            row[Head.ITEMS] //= GROUP // LANES
            row[Head.CHUNKS] = min(row[Head.CHUNKS], row[Head.ITEMS])
        self.rows[index] = tuple(row)
        return True

    def _write(self, step: Step, written: Float32Array | None = None) -> None:
        """Adds a step, and the array that it writes; with a unit it writes all of it."""
        if written is not None:
            self._forget(written)
            self._writers[_place(written)] = len(self.rows), step
        chunks = 1
        if self._pool.threads > 1:
            chunks = max(1, min(CHUNKS_PER_THREAD * self._pool.threads, step.items, step.floats // CHUNK_FLOATS))
        head = (build.address(step.kind, step.type_name), step.items, chunks, 0, 0)
        assert len(step.operands) <= ROW - HEADER
        self.rows.append((*head, *step.operands))

    def _forget(self, array: Float32Array) -> None:
        """An array is about to be written: what is known of this memory, or of parts of it, is no longer true."""
        first, size = _place(array)
        for known in (self._quantized, self._writers):
            for start, n_bytes in [*known]:
                if start < first + size and first < start + n_bytes:
                    del known[start, n_bytes]


class KeptAngles:
    """Angles of single positions, computed for some at a time: each of a dozen calls of numpy takes a microsecond."""

    def __init__(self, rope: RopeTable) -> None:
        self._rope = rope
        self._first = -1
        self._angles: tuple[Float32Array, Float32Array]

    def of(self, position: int) -> tuple[Float32Array, Float32Array]:
        """Cos and sin (n_pairs,) of a position."""
        first, place = position - position % PAGE, position % PAGE
        if first != self._first:
            self._angles = self._rope.cos_sin(np.arange(first, first + PAGE, dtype=np.int32))
            self._first = first
        cos, sin = self._angles
        return cos[place], sin[place]


def _place(array: Float32Array) -> Place:
    return address(array), array.nbytes
