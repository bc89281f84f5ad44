"""Steps as recorded programs: one forward pass written down once, then run without Python in between.

A step of a small model takes a millisecond or two; called brick by brick, Python and waking threads would take as long
again. The recorder (recorder.py) runs through the same forward pass as any batch. A program fits every later step with
as many rows: embeddings, angles and the places of rows in the cache are written before each run.
"""

from __future__ import annotations

import ctypes
import math
import sys
from dataclasses import dataclass
from functools import cache

import numpy as np

from engine.cpu.kernels import build
from engine.cpu.kernels.machine import COUNTERS
from engine.cpu.memory import aligned_empty
from engine.cpu.products.integer import IntegerWeights, all_matrices, is_integer
from engine.cpu.products.matmul import DOT_TOKENS, prepare
from engine.cpu.steps.fast_ops import FastOps
from engine.cpu.steps.operands import address
from engine.cpu.steps.plain import plain_layer
from engine.cpu.steps.protocol import Float32Array
from engine.cpu.steps.recorder import Recorder
from engine.cpu.threads import ThreadPool
from engine.model.batch import Batch
from engine.model.transformer import begun_states
from engine.model.weights import Linear, ModelWeights

MAX_ROWS = 512
"""Rows of a program, where all weights are multiplied in integers; else DOT_TOKENS, the most that one kernel takes."""

MAX_PRODUCTS = 1 << 35
"""Weights times rows of a program, about 0.2 s on two cores: until its end nothing can interrupt it. Of larger steps
the bricks take so long that it does not matter what is between them."""

MAX_HEADS = 64
"""Rows of logits that a program computes."""

KEPT_ROWS = 512
"""Rows of the programs that are kept: a row's buffers take some ten times the width in floats. Programs are cheap to
record, half a millisecond."""


class Program:
    """A step of a certain number of rows, ready to be run many times.

    Args:
        recorder: what was recorded.
        result: its last result, one row for each row of the step.
        pool: threads to run it on.
    """

    def __init__(self, recorder: Recorder, result: Float32Array, pool: ThreadPool) -> None:
        self._recorder = recorder  # owns the buffers
        self._result = result
        self._pool = pool
        self._table = recorder.table()
        self._counters = aligned_empty(len(self._table), recorder.regions, COUNTERS, dtype=np.int64)
        self._scratch = aligned_empty(pool.threads, -(-recorder.scratch_floats // 16) * 16)
        program = address(self._table), len(self._table), address(self._counters), recorder.regions
        scratch, scratch_bytes = address(self._scratch), self._scratch.strides[0]
        self._arguments = [  # of each thread
            (*program, index % recorder.regions, scratch + index * scratch_bytes) for index in range(pool.threads)
        ]

    def run(self, batch: Batch) -> Float32Array:
        """The result for a batch; the array is overwritten by the next run."""
        for fill in self._recorder.fills:
            fill(batch)
        self._counters.fill(0)
        run, give_way = build.kernel("run_program"), _give_way()
        arguments = self._arguments

        def task(index: int) -> None:
            run(*arguments[index], give_way)

        self._pool.run(task, self._pool.threads)
        return self._result


@dataclass(frozen=True)
class Shape:
    """What programs differ in.

    Attributes:
        rows: of the batch, or of what the head reads.
        alone: each row is a sequence of its own (CacheRows.alone).
        layers, head: whether it runs through the layers, and whether it computes logits of all its rows.
    """

    rows: int
    alone: bool = False
    layers: bool = True
    head: bool = True


class Programs:
    """Runs steps as programs, recorded when first needed.

    Args:
        weights: a model of which `can_record` is true.
        ops: its bricks.
        pool: threads to use.
        integer_weights: those that are multiplied in integers; None keeps everything in float32.

    Attributes:
        max_rows: rows of a program.
    """

    def __init__(
        self,
        weights: ModelWeights,
        ops: FastOps,
        pool: ThreadPool,
        integer_weights: IntegerWeights | None = None,
    ) -> None:
        self._weights = weights
        self._integer = integer_weights
        self._ops = ops
        self._pool = pool
        self._programs: dict[Shape, Program] = {}
        self._joined: dict[int, Float32Array] = {}  # by rows, what the head of a program without layers reads
        self._stateful = any(layer.recurrent is not None for layer in weights.layers)
        self.max_rows = DOT_TOKENS
        matrices = list(all_matrices(weights))
        if integer_weights is not None and all(integer_weights.takes(prepare(matrix)) for matrix in matrices):
            n_weights = sum(math.prod(matrix.shape) for matrix in matrices)
            self.max_rows = max(DOT_TOKENS, min(MAX_ROWS, MAX_PRODUCTS // n_weights))

    def takes(self, batch: Batch) -> bool:
        """Whether a batch is run as programs: a decode step, or one that is not too large."""
        n_rows = batch.n_tokens
        if len(batch.output_rows) == n_rows == len(batch.spans):
            return True
        if self._stateful:
            return False  # a program has a step for each sequence, and for its rows
        return n_rows <= self.max_rows and len(batch.output_rows) <= MAX_HEADS

    def run(self, batch: Batch, out: Float32Array) -> None:
        """Feed a batch that takes() accepts and write its logits to out (R, V).

        A decode step of more rows than a program has is several, one after another, which is faster than all rows brick
        by brick (16 rows in programs of 8, Q4_K, two cores of an EPYC 7003: 6 layers of width 256 take 4 ms instead of
        30, 8 layers of width 1024 take 85 instead of 144).

        Raises:
            ContextFullError, InvalidRequestError: as CpuBackend.forward.
        """
        self._ops.begin(batch)  # raises before anything is changed
        n_rows, most = batch.n_tokens, min(self.max_rows, MAX_HEADS)
        if len(batch.output_rows) < n_rows or n_rows <= most:
            self._run(batch, out)
            return
        n_parts = -(-n_rows // most)
        for part in range(n_parts):
            rows = range(n_rows * part // n_parts, n_rows * (part + 1) // n_parts)
            one = batch.single_rows(rows)
            self._ops.begin(one)
            self._run(one, out[rows.start : rows.stop])

    def _run(self, batch: Batch, out: Float32Array) -> None:
        """The same of a batch that has begun, by one program, or by one for the layers and one for some rows' head."""
        n_rows, alone = batch.n_tokens, len(batch.spans) == batch.n_tokens
        if len(batch.output_rows) == n_rows:
            out[:] = self._program(Shape(n_rows, alone), batch).run(batch)
        else:
            x = self._program(Shape(n_rows, alone, head=False), batch).run(batch)
            if not len(batch.output_rows):
                return
            head = self._program(Shape(len(batch.output_rows), layers=False), batch)
            self._joined[len(batch.output_rows)][:] = x[batch.output_rows]
            out[:] = head.run(batch)
        self._ops.finish_logits(out)

    def _program(self, shape: Shape, batch: Batch) -> Program:
        """The program of a shape; the batch has it."""
        program = self._programs.pop(shape, None)
        if program is None:
            program = self._record(shape, batch)
        while self._programs and sum(other.rows for other in self._programs) + shape.rows > KEPT_ROWS:
            self._programs.pop(next(iter(self._programs)))  # the one whose last run is longest ago
        self._programs[shape] = program
        return program

    def _record(self, shape: Shape, batch: Batch) -> Program:
        recorder = Recorder(self._pool, self._integer, rounded=self._ops.rounded)
        computing, self._ops.steps = self._ops.steps, recorder
        try:
            if shape.layers:
                x = begun_states(self._weights, self._ops, batch)
            else:
                x = self._joined[shape.rows] = recorder.empty("x", (shape.rows, self._weights.token_embd.columns))
            result = self._ops.head_products(x) if shape.head else x
        finally:
            self._ops.steps = computing
        return Program(recorder, result, self._pool)


def can_record(weights: ModelWeights) -> bool:
    """Whether a decode step always runs the same steps (experts do not), all of them compiled.

    A program also needs a call of the system with which a waiting thread yields the processor.
    """
    if _give_way() is None:
        return False
    if weights.output is None:
        return False
    linears: list[Linear | None] = [weights.output]
    for layer in weights.layers:
        if not plain_layer(layer):
            return False
        if layer.ffn is not None:
            linears += (layer.ffn.up, layer.ffn.down, layer.ffn.gate)
        if layer.recurrent is not None:
            linears += (linear for linear in layer.recurrent.linears() if isinstance(linear, Linear))
        if layer.config.attention_part is not None:
            attention = layer.attention
            linears += (attention.q, attention.k, attention.v, attention.output)
    matrices = (linear.weight for linear in linears if linear is not None)
    return all(prepare(matrix).kernels or is_integer(matrix.type, matrix.columns) for matrix in matrices)


@cache
def _give_way() -> int | None:
    """Address of the system's call that yields the processor; None where none is known."""
    try:
        if sys.platform == "win32":
            call = ctypes.CDLL("kernel32").SwitchToThread
        else:
            call = ctypes.CDLL(None).sched_yield
    except (OSError, AttributeError, TypeError):
        return None
    return ctypes.cast(call, ctypes.c_void_p).value
