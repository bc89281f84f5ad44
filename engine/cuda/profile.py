"""Where a decode step's time goes: every brick timed on its own, in bytes per second and percent of the ceiling.

A brick's launches for all layers are captured as one chain and replayed between two events, so that what is measured is
the GPU and not Python. Before every replay the L2 cache is overwritten: each layer's weights are then read from memory
once, as in a real step. A chain cannot overlap with its neighbours in the step; the row `step` is the real whole, and
the sum of the bricks is what it would take without that. Must not know of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

import numpy as np

from engine.config import page_count
from engine.cuda.attention.cache import PagedCache
from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.graphs import capture
from engine.cuda.load.device_weights import DeviceLayer
from engine.cuda.recurrent.state_cache import StateCache
from engine.cuda.rows import rows
from engine.cuda.step.folding import Hidden, Left, columns_of
from engine.cuda.step.machine import StepMachine
from engine.gguf.types import row_bytes
from engine.model.brick_time import BrickTime
from engine.model.cache import StateRows
from engine.request import ActiveSequence
from engine.sampling.params import SamplingParams

REPEATS = 20
_WARM_UP = 2
_FLUSHES = 4  # times the L2 cache that are written before a replay


def profile_decode(
    machine: StepMachine, stream: Stream, context_length: int, depth: int, n_rows: int, repeats: int = REPEATS
) -> list[BrickTime]:
    """Time every brick of a decode step.

    Args:
        machine: without running sequences; the profile has caches of its own.
        stream: its stream, which is the current one.
        context_length: positions of one sequence.
        depth: tokens already in the cache of every row.
        n_rows: sequences side by side.
        repeats: replays of each chain; the median counts.

    Returns:
        The bricks in the order of a step, after "launch" and before "step".

    Raises:
        DeviceError: the GPU failed.
    """
    try:
        return _Profiler(machine, stream, context_length, depth, n_rows, repeats).run()
    finally:
        stream.synchronize()
        for slot in range(n_rows):
            machine.slots.set_position(slot, -1)
        machine.flush()


class _Profiler:
    """One profile at one setting, on the current stream and in the current pool."""

    def __init__(
        self, machine: StepMachine, stream: Stream, context_length: int, depth: int, n_rows: int, repeats: int
    ) -> None:
        import cupy

        self._machine, self._depth, self._n, self._repeats = machine, depth, n_rows, repeats
        self._stream, self._context_length = stream, context_length
        self._weights = machine.weights
        plan = self._weights.plan
        pages = n_rows * page_count(depth + 1)
        self._cache = PagedCache(plan.cache_shapes, pages, context_length, n_rows, plan.cache_layers)
        self._states = StateCache(plan.state_shapes, StateRows(n_rows, 2, 0)) if machine.states is not None else None
        self._ops = machine.decode_ops(n_rows, self._cache, self._states)
        cache_bytes = int(cupy.cuda.Device().attributes.get("L2CacheSize", 0)) or 64 << 20
        self._flush = cupy.empty(_FLUSHES * cache_bytes, cupy.uint8)
        self._tiny = cupy.zeros(1, cupy.float32)
        self._positions = np.full(n_rows, depth, np.int32)
        self._noise = np.random.default_rng(0)

    def run(self) -> list[BrickTime]:
        self._prepare()
        ops, n = self._ops, self._n
        x, logits = ops.buffers.x[:n], self._machine.logits[:n]
        layers = self._weights.layers
        attending = [layer for layer in layers if layer.attention_part is not None or layer.compressed is not None]
        recurrent = [layer for layer in layers if layer.recurrent_part is not None]
        dense = [layer for layer in layers if layer.ffn is not None]
        mixing = [layer for layer in layers if layer.channel_mix is not None]
        mixtures = [layer for layer in layers if layer.moe is not None]
        embedding, output = self._weights.token_embd, self._weights.output
        assert output is not None
        times = [
            self._time("launch", [lambda: rows.copy(self._tiny, self._tiny)], 0),
            self._time("embed", [lambda: ops.embed(None)], n * row_bytes(embedding.type, embedding.columns)),
            self._each("attn_qkv", attending, lambda one: ops.attn_qkv(one, x), _qkv_bytes),
            self._each("attention", attending, lambda one: ops.attention(one, self._qkv(one)), self._cache_bytes),
            self._each(
                "attn_output",
                attending,
                lambda one: ops.attn_output(one, self._attended(one), x),
                _output_bytes,
            ),
            self._each("ssm_in", recurrent, lambda one: ops.ssm_in(one, x), _input_bytes),
            self._each("ssm", recurrent, lambda one: ops.ssm(one, self._given(one)), self._state_bytes),
            self._each(
                "ssm_out",
                recurrent,
                lambda one: ops.ssm_out(one, self._scanned(one), x),
                lambda one: one.recurrent.output.n_bytes,
            ),
            self._each(
                "ffn_gate_up",
                dense,
                lambda one: ops.ffn_gate_up(one, x),
                lambda one: 0 if one.ffn is None else one.ffn.gate_up_bytes,
            ),
            self._each(
                "ffn_down",
                dense,
                lambda one: ops.ffn_down(one, self._hidden(one), x),
                lambda one: 0 if one.ffn is None else one.ffn.down.n_bytes,
            ),
            self._each(
                "channel_mix",
                mixing,
                lambda one: ops.channel_mix(one, x),
                lambda one: 0 if one.channel_mix is None else one.channel_mix.n_bytes,
            ),
            self._each("ffn_moe", mixtures, lambda one: ops.ffn_moe(one, x, x), self._mixture_bytes),
            self._time("head", [lambda: ops.logits(x, logits)], output.n_bytes),
            self._time("sample", [lambda: self._machine.slots.sample(logits)], logits.nbytes, samples=True),
        ]
        order = [launch.brick for launch in self._weights.plan.decode(n)]
        first, *rest = (time for time in times if time.calls)
        times = [first, *sorted(rest, key=lambda time: order.index(time.brick))]
        whole = [lambda: self._machine.run_step(ops, n)]
        times.append(self._time("step", whole, sum(time.n_bytes for time in times), samples=True))
        return times

    # ---- inputs ----------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Noise everywhere, so that nothing is measured on zeros; greedy sampling in every row."""
        buffers, n = self._ops.buffers, self._n
        for buffer in (buffers.x, buffers.qkv, buffers.attention, buffers.gate, buffers.mixed, buffers.scanned):
            buffer.set(self._noise.standard_normal(buffer.shape).astype(np.float32))
        machine, cache, pages = self._machine, self._cache, page_count(self._depth + 1)
        for array in (one for layer in cache.layers if layer is not None for one in layer.paged):
            page = self._noise.standard_normal(array.shape[1:]).astype(array.dtype)
            for index in range(n * pages):
                array[index].set(page)
        for slot in range(n):
            greedy = SamplingParams(temperature=0)
            sequence = ActiveSequence(-1, slot, [0] * (self._depth + 1), [], greedy, 0)
            cache.set_pages(slot, list(range(slot * pages, (slot + 1) * pages)))
            machine.slots.begin(sequence, self._depth, self._context_length, slot)
        cache.flush(machine.staging)
        machine.flush()

    def _qkv(self, layer: DeviceLayer) -> DeviceArray:
        blocks = layer.compressed
        shape = layer.attention.shape if blocks is None else blocks.plan.shape.attention
        return columns_of(self._ops.buffers.qkv, self._n, shape.row_width)

    def _attended(self, layer: DeviceLayer) -> DeviceArray:
        plan = layer.attention.plan if layer.compressed is None else layer.compressed.plan
        return columns_of(self._ops.buffers.attention, self._n, plan.widths()["attention"])

    def _given(self, layer: DeviceLayer) -> DeviceArray:
        return columns_of(self._ops.buffers.mixed, self._n, layer.recurrent.plan.mixed_width)

    def _scanned(self, layer: DeviceLayer) -> DeviceArray:
        return columns_of(self._ops.buffers.scanned, self._n, layer.recurrent.output.columns)

    def _hidden(self, layer: DeviceLayer) -> Hidden:
        assert layer.ffn is not None
        hidden = columns_of(self._ops.buffers.gate, self._n, layer.ffn.plan.width)
        return Left(hidden) if layer.plan.leaves_hidden and self._ops.step.hands_over else hidden

    # ---- bytes -----------------------------------------------------------------------------------------------

    def _cache_bytes(self, layer: DeviceLayer) -> int:
        if layer.compressed is not None:
            return self._n * layer.compressed.plan.shape.read_bytes(self._depth + 1)
        shape, indexer, seen, scored = layer.attention.shape, layer.attention.plan.indexer, self._depth + 1, 0
        if layer.attention.constants.window:
            seen = min(seen, layer.attention.constants.window)
        if indexer is not None and seen > indexer.shape.all_chosen:
            seen, scored = indexer.shape.top * indexer.shape.block, seen * indexer.cached_width
        return self._n * (seen * shape.kv_heads * shape.cached_bytes + scored * shape.kv_type.float_bytes)

    def _state_bytes(self, layer: DeviceLayer) -> int:
        """The products' matrices, constants, and the states, which are read and written."""
        mixer = layer.recurrent
        constants = sum(int(array.nbytes) for array in mixer.constants if array is not None)
        return sum(one.n_bytes for one in mixer.inner) + constants + 2 * self._n * mixer.plan.shape.state_bytes

    def _mixture_bytes(self, layer: DeviceLayer) -> int:
        """Router, the chosen experts (at most n_rows * used different ones), and the shared one."""
        moe = layer.moe
        assert moe is not None
        routing = moe.plan.routing
        read = min(routing.n_experts, self._n * routing.n_used) + routing.n_shared
        total = moe.router.n_bytes + read * moe.expert_bytes // routing.n_stacked
        if moe.shared is not None:
            total += moe.shared.gate_up_bytes + moe.shared.down.n_bytes
        return total + (moe.shared_gate.n_bytes if moe.shared_gate is not None else 0)

    # ---- time ------------------------------------------------------------------------------------------------

    def _each(
        self,
        brick: str,
        layers: Iterable[DeviceLayer],
        call: Callable[[DeviceLayer], object],
        n_bytes: Callable[[DeviceLayer], int],
    ) -> BrickTime:
        """A brick that several layers have."""
        chosen = list(layers)
        calls = [lambda one=layer: call(one) for layer in chosen]
        return self._time(brick, calls, sum(n_bytes(layer) for layer in chosen))

    def _time(
        self, brick: str, calls: Sequence[Callable[[], object]], n_bytes: int, *, samples: bool = False
    ) -> BrickTime:
        """Median time of a replay of all calls. samples: they sample once, which moves positions and results on."""
        import cupy

        if not calls:
            return BrickTime(brick, 0, 0.0, 0)
        for call in calls:
            call()  # builds and loads its kernels: not allowed during capture
        if samples:
            self._machine.slots.count_launch()
        self._stream.synchronize()
        graph = capture(self._stream, lambda: [call() for call in calls])
        begin, end, times = cupy.cuda.Event(), cupy.cuda.Event(), []
        positions = self._machine.slots.positions[: self._n]
        for _ in range(self._repeats + _WARM_UP):
            positions.set(self._positions, stream=self._stream)
            cupy.cuda.runtime.memsetAsync(self._flush.data.ptr, 0, self._flush.nbytes, self._stream.ptr)
            begin.record(self._stream)
            graph.launch(self._stream)
            end.record(self._stream)
            if samples:
                self._machine.slots.count_launch()
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e-3)
        return BrickTime(brick, len(calls), median(times[_WARM_UP:]), n_bytes)


def _qkv_bytes(layer: DeviceLayer) -> int:
    if layer.compressed is not None:
        return layer.compressed.input_bytes
    qkv, latent, indexer = layer.attention.qkv, layer.attention.latent, layer.attention.indexer
    own = 0 if indexer is None else indexer.n_bytes
    if qkv is not None:
        return qkv.n_bytes + own
    assert latent is not None
    parts = (latent.inputs, latent.q_b, latent.kv_b, latent.k_b)
    return sum(one.n_bytes for one in parts if one is not None) + own


def _input_bytes(layer: DeviceLayer) -> int:
    inputs = layer.recurrent.inputs
    return 0 if inputs is None else inputs.n_bytes


def _output_bytes(layer: DeviceLayer) -> int:
    if layer.compressed is not None:
        return layer.compressed.output_bytes
    latent = layer.attention.latent
    values = latent.v_b if latent is not None else None
    return layer.attention.output.n_bytes + (0 if values is None else values.n_bytes)
