"""Steps that compute when they are asked for: prompts, and decode steps that cannot be recorded."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.cpu import reference
from engine.cpu.caches.rows import CacheRows
from engine.cpu.kernels.attention.attend import attend, attend_text
from engine.cpu.kernels.build import kernel
from engine.cpu.kernels.integer.activations import Form
from engine.cpu.products.integer import Activations, IntegerWeights, empty_activations
from engine.cpu.products.matmul import Epilogue, PreparedWeight, matmul, prepare
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

TASK_FLOATS = 1 << 15
"""Least floats per task of a small step: about 10 us."""

PER_FLOAT = 16
"""Products in integers that count as one of these floats."""


class Immediate:
    """Steps that compute when they are asked for, into new arrays.

    Args:
        pool: threads to use.
        integer: the weights that are multiplied in integers; None keeps everything in float32.
        rounded: round activations to BF16 where weights are (products/matmul.py).
    """

    def __init__(self, pool: ThreadPool, integer: IntegerWeights | None = None, *, rounded: bool = False) -> None:
        self._pool = pool
        self._integer = integer
        self._rounded = rounded
        self._quantized: tuple[Float32Array, Form, Activations] | None = None

    def join(self) -> None:
        """See Steps.join."""
        self._quantized = None  # what was read until now may be overwritten

    def empty(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """See Steps.empty."""
        return self._pool.memory.empty(*shape)

    def embed(self, name: str, table: Weight, batch: Batch, finish: Finish) -> Float32Array:
        """See Steps.embed."""
        out = self._pool.memory.empty(batch.n_tokens, table.columns)
        embed_rows(table, batch.token_ids, out)
        finish(out, batch)
        return out

    def angles(self, rope: RopeTable, positions: Int32Array) -> Angles:
        """See Steps.angles."""
        return Angles(*rope.cos_sin(positions), rope.style)

    def cache_rows(self, batch: Batch, tables: npt.NDArray[np.int64], chunk: int | None = None) -> CacheRows:
        """See Steps.cache_rows."""
        return CacheRows.of(batch, tables, chunk)

    def factors(self, temperature: AttentionTemperature, positions: Int32Array) -> Float32Array:
        """See Steps.factors."""
        return reference.temperature_factors(positions, temperature)

    def normalize(
        self, name: str, x: Float32Array, norm: Norm, residual: Float32Array | None = None, factor: float = 1.0
    ) -> Float32Array:
        """See Steps.normalize."""
        out = self._pool.memory.empty(*x.shape)
        self.run(normalize_step(x, norm, out, residual, factor), x, out, residual)
        return out

    def linear(self, name: str, x: Float32Array, linear: Linear, residual: Float32Array | None = None) -> Float32Array:
        """See Steps.linear."""
        weight = prepare(linear.weight)
        if self._integer is not None and self._integer.takes(weight):
            activations = self._activations(x, self._integer.form(weight, len(x)))
            return self._multiply(self._integer, activations, linear, weight, residual)
        epilogue = Epilogue(linear.scale, linear.bias, residual)
        return matmul(x, linear.weight, pool=self._pool, epilogue=epilogue, rounded=self._rounded)

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
        self.run(rotate_step(x, rows, angles, cache, factors, store), x, angles, factors, rows)

    def attend(
        self,
        out: Float32Array,
        q: Float32Array,
        rows: CacheRows,
        cache: tuple[Pages, Pages],
        layer: LayerWeights,
    ) -> None:
        """See Steps.attend."""
        attend(q, *cache, rows, pool=self._pool, out=out, **score_settings(layer))

    def attend_texts(
        self,
        out: Float32Array,
        q: Float32Array,
        batch: Batch,
        tables: npt.NDArray[np.int64],
        cache: tuple[Pages, Pages],
        layer: LayerWeights,
    ) -> None:
        """Attention of whole texts over themselves, in both directions, from q (T, H, Hd) into out (T, H · Hv).

        A task is a text, or some heads of one where there are few texts.
        """
        settings = score_settings(layer)
        if settings["window"] is not None:
            settings["window"] = settings["window"] // 2 + 1  # itself, and what is ahead in one direction
        spans, (keys, values) = batch.spans, cache
        n_heads, threads = layer.config.attention.n_kv_heads, self._pool.threads
        parts = 1 if threads == 1 else min(n_heads, -(-2 * threads // len(spans)))
        rows = [slice(span.row, span.row + span.n_rows) for span in spans]

        def task(index: int) -> None:
            text, part = divmod(index, parts)
            pages = tables[spans[text].slot]
            heads = range(n_heads * part // parts, n_heads * (part + 1) // parts)
            attend_text(q[rows[text]], keys, values, pages, out[rows[text]], heads, settings)

        self._pool.run(task, len(spans) * parts)

    def gate(self, x: Float32Array, y: Float32Array | None, activation: Activation | None) -> Float32Array:
        """See Steps.gate."""
        self.run(gate_step(x, y, activation), x, y)
        return x

    def take_columns(self, name: str, x: Float32Array, first: int, width: int) -> Float32Array:
        """See Steps.take_columns."""
        out = self._pool.memory.empty(len(x), x.shape[1] * width)
        self.run(columns_step(x, first, width, out), x, out)
        return out

    def state_rows(self, batch: Batch, find: FindRows) -> npt.NDArray[np.int64]:
        """See Steps.state_rows."""
        return find(batch)

    def recur(self, step: Step, out: Float32Array, *alive: object) -> None:
        """See Steps.recur."""
        self.run(step, out, alive)

    def _activations(self, x: Float32Array, form: Form) -> Activations:
        """The rows of x in integers; several products of the same rows share them."""
        if self._quantized is None or self._quantized[0] is not x or self._quantized[1] is not form:
            rows = x if x.strides[1] == x.itemsize else np.ascontiguousarray(x)
            out = empty_activations(len(x), x.shape[1], form)
            self.run(quantize_step(rows, out, form), rows, out)
            self._quantized = x, form, out
        return self._quantized[2]

    def _multiply(
        self,
        integer: IntegerWeights,
        x: Activations,
        linear: Linear,
        weight: PreparedWeight,
        residual: Float32Array | None,
    ) -> Float32Array:
        out = self._pool.memory.empty(len(x), weight.rows)
        if not len(x):
            return out
        self.run(integer_step(integer, x, linear, weight, out, residual, PER_FLOAT), x, out, linear, residual)
        return out

    def run(self, step: Step, *alive: object) -> None:
        """Run a step; `alive` is what its addresses point into."""
        compute = kernel(step.kind, step.type_name)
        operands = np.array(step.operands, dtype=np.int64)
        start = address(operands)
        n_tasks = min(4 * self._pool.threads, step.items, step.floats // TASK_FLOATS)
        if n_tasks < 2 or self._pool.threads == 1:
            compute(start, 0, step.items, 0)
            return

        def task(index: int, held: object = (operands, alive)) -> None:
            compute(start, step.items * index // n_tasks, step.items * (index + 1) // n_tasks, 0)

        self._pool.run(task, n_tasks)
