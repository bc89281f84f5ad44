"""Decode steps as recorded programs: one forward pass written down once, then run without Python in between.

A step of a small model takes a millisecond or two; called step by step, Python and waking threads would take as long
again. The recorder (recorder.py) runs through the same forward pass as any batch. Later steps of the same sequences
only change embeddings, angles and lengths.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import numpy as np

from engine.cpu.caches.model import KVCache
from engine.cpu.kernels import build
from engine.cpu.kernels.machine import COUNTERS
from engine.cpu.memory import aligned_empty
from engine.cpu.products import integer
from engine.cpu.products.integer import IntegerWeights
from engine.cpu.products.matmul import DOT_TOKENS, prepare
from engine.cpu.steps.fast_ops import FastOps, plain_layer
from engine.cpu.steps.operands import address
from engine.cpu.steps.protocol import Float32Array
from engine.cpu.steps.recorder import Recorder
from engine.cpu.threads import ThreadPool
from engine.model.batch import Batch
from engine.model.transformer import hidden_states
from engine.model.weights import Linear, ModelWeights

MAX_PROGRAMS = 32
"""Programs kept; they are cheap to record, a few hundred microseconds."""


class Program:
    """A decode step of certain cache slots, ready to be run many times.

    Args:
        recorder: what was recorded.
        logits: its last result, (T, V).
        pool: threads to run it on.
    """

    def __init__(self, recorder: Recorder, logits: Float32Array, pool: ThreadPool) -> None:
        self._recorder = recorder  # owns the buffers
        self._logits = logits
        self._pool = pool
        self._table = recorder.table()
        self._counters = np.zeros((len(self._table), COUNTERS), dtype=np.int64)
        self._scratch = aligned_empty(pool.threads, -(-recorder.scratch_floats // 16) * 16)
        places = np.array(recorder.lengths, dtype=np.intp)
        self._length_places = places[:, 0], places[:, 1]
        self._length_rows = places[:, 2]

    def run(self, batch: Batch) -> Float32Array:
        """Logits (T, V) of one more token per sequence; the array is overwritten by the next run."""
        for fill in self._recorder.fills:
            fill(batch)
        self._table[self._length_places] = batch.positions[self._length_rows]
        self._counters.fill(0)
        run, give_way = build.kernel("run_program"), _give_way()
        table, counters = address(self._table), address(self._counters)
        scratch, scratch_bytes = address(self._scratch), self._scratch.strides[0]

        def task(index: int) -> None:
            run(table, len(self._table), counters, scratch + index * scratch_bytes, give_way)

        self._pool.run(task, self._pool.threads)
        return self._logits


class Decoder:
    """Runs steps of one token per sequence as programs, recorded when first needed.

    A program has at most DOT_TOKENS rows; of more sequences several run one after another. That is faster than all rows
    brick by brick (16 rows, Q4_K, two cores of an EPYC 7003: 6 layers of width 256 take 4 ms instead of 30, 8 layers of
    width 1024 take 85 instead of 144).

    Args:
        weights: a model of which `can_record` is true.
        ops: its bricks.
        kv_cache: the cache they write to.
        pool: threads to use.
        integer_weights: those that are multiplied in integers; None keeps everything in float32.
    """

    def __init__(
        self,
        weights: ModelWeights,
        ops: FastOps,
        kv_cache: KVCache,
        pool: ThreadPool,
        integer_weights: IntegerWeights | None = None,
    ) -> None:
        self._weights = weights
        self._integer = integer_weights
        self._ops = ops
        self._cache = kv_cache
        self._pool = pool
        self._programs: dict[tuple[int, ...], Program] = {}

    def takes(self, batch: Batch) -> bool:
        """Whether a batch is such a step, with logits wanted of every sequence."""
        return len(batch.output_rows) == batch.n_tokens == len(batch.spans)

    def run(self, batch: Batch, out: Float32Array) -> None:
        """Feed a batch that takes() accepts and write its logits to out (R, V).

        Raises:
            ContextFullError, InvalidRequestError: as CpuBackend.forward.
        """
        self._ops.begin(batch)  # raises before anything is changed
        if batch.n_tokens <= DOT_TOKENS:
            out[:] = self._run(batch)
            return
        # By slots, so that a program still fits when a sequence of another program joins or leaves.
        groups: dict[int, list[int]] = {}
        for row in sorted(range(batch.n_tokens), key=lambda row: batch.spans[row].slot):
            groups.setdefault(batch.spans[row].slot // DOT_TOKENS, []).append(row)
        for rows in groups.values():
            part = batch.single_rows(rows)
            self._ops.begin(part)
            out[rows] = self._run(part)

    def _run(self, batch: Batch) -> Float32Array:
        """The logits of a batch that has begun, overwritten by the next run."""
        key = tuple(span.slot for span in batch.spans)
        program = self._programs.get(key)
        if program is None:
            if len(self._programs) >= MAX_PROGRAMS:
                self._programs.clear()
            program = self._programs[key] = self._record(batch)
        return self._ops.finish_logits(program.run(batch))

    def _record(self, batch: Batch) -> Program:
        recorder = Recorder(self._pool, self._integer)
        computing, self._ops.steps = self._ops.steps, recorder
        try:
            logits = self._ops.head_products(hidden_states(self._weights, self._ops, batch))
        finally:
            self._ops.steps = computing
        return Program(recorder, logits, self._pool)


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
        if layer.ffn is None or not plain_layer(layer):
            return False
        attention, ffn = layer.attention, layer.ffn
        linears += (attention.q, attention.k, attention.v, attention.output, ffn.up, ffn.down, ffn.gate)
    matrices = (linear.weight for linear in linears if linear is not None)
    return all(prepare(matrix).kernels or integer.is_integer(matrix.type) for matrix in matrices)


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
