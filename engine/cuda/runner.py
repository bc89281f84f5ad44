"""The model on one GPU behind the Runner protocol: prompts, decode steps, scores, and the way out when the GPU fails.

All device memory of a runner comes from a pool of its own, so that close() gives back exactly what it took and two open
models do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from engine.cuda import availability, dequant, module, repack, rows
from engine.cuda.attention import PAGE, Attention, AttentionShape, build_jobs
from engine.cuda.buffers import Activations, Widths
from engine.cuda.cache import PagedCache, page_count
from engine.cuda.decode import DecodeLoop
from engine.cuda.dense import DenseProduct
from engine.cuda.features import check_features
from engine.cuda.matvec import MAX_COLUMNS, group_jobs
from engine.cuda.ops import DecodeOps, PrefillOps, padded_rows
from engine.cuda.plan import LOGIT_ROWS, PREFILL_ROWS, fit, make_plan, memory_plan
from engine.cuda.sampling_ops import SOURCES as SAMPLING_FILES
from engine.cuda.slots import DeviceSlots
from engine.cuda.weights import DeviceWeights, Uploader, attention_shape, check_types, kernel_groups
from engine.errors import ContextFullError, DeviceError
from engine.model.batch import Batch, Outputs
from engine.model.loader import LoadedModel
from engine.model.memory import MemoryPlan
from engine.model.transformer import hidden_states
from engine.model.weights import ModelWeights
from engine.request import TokenSample, Work
from engine.sampling.logprobs import log_probabilities

RING = 8
"""Places for results that the device has written and the host has not read, beside one for the prompt of each slot:
all slots may draw their first token between two reads of a decode step."""


class CudaRunner:
    """One model on one GPU; see engine.runner.Runner.

    Args:
        model: the loaded file; it may be closed once this returns.
        context_length: positions of one sequence.
        kv_type: "f16" or "f32".
        max_sequences: slots asked for; fewer where the memory does not suffice for all.
        device_index: which GPU.
        status: told what takes long.
        eager: launch every decode step kernel by kernel instead of replaying a captured graph.

    Raises:
        DeviceError: no usable GPU, a part of the model without kernels, too little memory, a kernel that does not
            build.
        UnsupportedModelError: a tensor type without GPU kernels.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        context_length: int,
        kv_type: str,
        max_sequences: int,
        device_index: int = 0,
        status: Callable[[str], None] = lambda _: None,
        eager: bool = False,
    ) -> None:
        reason = availability(device_index)
        if reason is not None:
            raise DeviceError(f"device 'cuda:{device_index}' cannot be used: {reason}")
        check_features(model)
        check_types(model)
        import cupy

        self.config = model.config
        self.context_length = context_length
        self.threads: int | None = None
        self._bandwidth: float | None = None
        self._broken: str | None = None
        self._closed = False
        self._device = cupy.cuda.Device(device_index)
        self._eager = eager
        with self._device, _device_errors("opening the model"):
            properties = cupy.cuda.runtime.getDeviceProperties(device_index)
            self.device_name = f"cuda:{device_index} ({properties['name'].decode()})"
            card = (module.device_arch(), int(properties["multiProcessorCount"]))
            self._plan = fit(
                make_plan(
                    model, context_length=context_length, kv_type=kv_type, max_sequences=max_sequences, card=card
                ),
                int(cupy.cuda.runtime.memGetInfo()[0]),
                context_length,
                PAGE,
            )
            self.max_sequences = self._plan.slots
            self._pool = cupy.cuda.MemoryPool()
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._open(model, kv_type, card, status)

    def _open(self, model: LoadedModel, kv_type: str, card: tuple[int, int], status: Callable[[str], None]) -> None:
        """Everything that allocates."""
        import cupy

        try:
            with self._on_device():
                total = model.weights_bytes
                uploader = Uploader(self._stream, lambda done: status(f"uploading weights {done * 100 // total} %"))
                # The compiler works without the GIL and without the device: it runs beside the upload.
                with ThreadPoolExecutor(max_workers=1) as side:
                    building = side.submit(self._build, model, kv_type, card, status)
                    self._weights = uploader.model(model, kv_type == "f16")
                    building.result()
                del uploader
                self._pool.free_all_blocks()
                self._allocate(kv_type)
                status("capturing the decode step")
                self._graphs = {} if self._eager else {bucket: self._capture(bucket) for bucket in self._buckets}
                self._stream.synchronize()
        except cupy.cuda.memory.OutOfMemoryError as error:
            self._pool.free_all_blocks()
            raise DeviceError(f"the GPU ran out of memory while the model was opened: {error}") from error

    def _build(self, model: LoadedModel, kv_type: str, card: tuple[int, int], status: Callable[[str], None]) -> None:
        """Compiles every kernel the file needs that is not in the cache yet, side by side."""
        jobs: dict[str, tuple[Sequence[str], dict[str, object] | None]] = {}

        def add(files: Sequence[str], defines: dict[str, object] | None) -> None:
            jobs[repr((files, defines))] = (files, defines)

        for info in model.gguf.tensors.values():
            if len(info.shape) > 1:
                add(*repack.build_job(info.type))
                for job in dequant.build_jobs(info.type):
                    add(*job)
        for layer in model.config.layers:
            for job in build_jobs(attention_shape(layer.attention, kv_type == "f16"), *card):
                add(*job)
        add(rows.FILES, None)
        batches = sorted({1, MAX_COLUMNS, *_buckets(self.max_sequences)})
        for matrices, columns, paired, activation in kernel_groups(model):
            for job in group_jobs(matrices, columns, batches, card, paired=paired, activation=activation):
                add(*job)
        add(SAMPLING_FILES, None)
        module.prebuild(list(jobs.values()), card[0], status)

    def _allocate(self, kv_type: str) -> None:
        import cupy

        layers = self._weights.layers
        shapes = [layer.shape for layer in layers]
        widths = Widths.of(self.config)
        slots = self.max_sequences
        self._buckets = _buckets(slots)
        self._cache = PagedCache(shapes, self.context_length, slots)
        self._attention: dict[AttentionShape, Attention] = {s: Attention(s, slots) for s in set(shapes)}
        self._decode_buffers = Activations(widths, slots, dense=False)
        self._prefill_buffers = Activations(widths, PREFILL_ROWS, dense=True)
        self._logits = cupy.zeros((slots, widths.vocab), cupy.float32)
        self._logit_rows = cupy.zeros((LOGIT_ROWS, widths.vocab), cupy.float32)
        places = RING + slots
        self._slots = DeviceSlots(widths.vocab, slots, self.context_length, places=places, stream=self._stream)
        self._prefill = PrefillOps(self._weights, self._prefill_buffers, DenseProduct(), self._attention)
        self._prefill.use(self._cache)
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(places)]
        self._loop = DecodeLoop(
            enqueue=self._enqueue,
            read=self._slots.read,
            wait=lambda place: self._events[place].synchronize(),
            deactivate=self._slots.deactivate,
            buckets=self._buckets,
            context_length=self.context_length,
        )

    # ---- decode ----------------------------------------------------------------------------------------------

    def decode_ops(self, n: int) -> DecodeOps:
        """The bricks of a decode step over rows 0..n-1."""
        return DecodeOps(
            self._weights,
            self._decode_buffers,
            self._cache,
            self._attention,
            self._slots.tokens,
            self._slots.positions,
            n,
        )

    def run_step(self, ops: DecodeOps, n: int) -> None:
        """All bricks of one decode step and its sampling, on the current stream."""
        x = hidden_states(cast(ModelWeights, self._weights), cast(Any, ops), cast(Batch, None))
        ops.logits(x, self._logits[:n])
        self._slots.sample(self._logits[:n])

    def _capture(self, n: int) -> Any:
        """The captured step over rows 0..n-1, warmed up on inactive rows."""
        ops = self.decode_ops(n)  # no slot is active yet: the step writes nothing
        self.run_step(ops, n)  # builds and loads every kernel: neither is allowed during capture
        self._slots.count_launch()
        self._stream.synchronize()
        self._stream.begin_capture()
        try:
            self.run_step(ops, n)
        finally:
            graph = self._stream.end_capture()
        return graph

    def _enqueue(self, n: int) -> int:
        """One decode step over rows 0..n-1; returns the place of its results."""
        if self._eager:
            self.run_step(self.decode_ops(n), n)
        else:
            self._graphs[n].launch(self._stream)
        place = self._slots.count_launch()
        self._events[place].record(self._stream)
        return place

    # ---- Runner ----------------------------------------------------------------------------------------------

    def step(self, work: Sequence[Work]) -> list[TokenSample | None]:
        """See Runner.step."""
        with self._running():
            results: dict[int, TokenSample | None] = {}
            decode = [w for w in work if self._is_decode(w)]
            for item in work:
                if not self._is_decode(item):
                    results[item.sequence.slot] = self._feed(item)
            if decode:
                samples = self._loop.step(w.sequence for w in decode)
                results.update(zip((w.sequence.slot for w in decode), samples, strict=True))
            return [results[item.sequence.slot] for item in work]

    def _is_decode(self, work: Work) -> bool:
        return (
            len(work.token_ids) == 1 and work.sample and self._loop.holds(work.sequence, work.start, work.token_ids[0])
        )

    def _feed(self, work: Work) -> TokenSample | None:
        """Prompt tokens of one sequence; draws the token after them where asked."""
        sequence, end = work.sequence, work.start + len(work.token_ids)
        self._check_room(end)
        self._loop.stop(sequence.slot)
        last = self._hidden(work, Outputs.LAST)
        if not work.sample:
            return None
        slot = sequence.slot
        self._slots.begin(sequence, end - 1)
        self._prefill.logits(last, self._logits[slot : slot + 1])
        place = self._slots.sample_one(self._logits[slot : slot + 1], slot)
        self._stream.synchronize()
        sample = self._slots.read(place, 0, sequence)
        if end < self.context_length:
            self._loop.start(slot, sequence.request_id, end, sample.token_id)
        return sample

    def _hidden(self, work: Work, outputs: Outputs) -> Any:
        """The residual stream (rows, D) behind the last piece of the work's tokens; LAST gives its last row only."""
        ids = np.asarray(work.token_ids, dtype=np.int32)
        for first in range(0, len(ids), PREFILL_ROWS):
            piece = ids[first : first + PREFILL_ROWS]
            batch = Batch.build([(work.sequence.slot, piece, work.start + first, outputs)])
            x = hidden_states(cast(ModelWeights, self._weights), cast(Any, self._prefill), batch)
        return x[len(piece) - 1 : len(piece)] if outputs is Outputs.LAST else x[: len(piece)]

    def score(self, work: Work) -> list[TokenSample]:
        """See Runner.score."""
        with self._running():
            self._check_room(work.start + len(work.token_ids))
            self._loop.stop(work.sequence.slot)
            targets = iter(work.sequence.prompt_ids[work.start + 1 :])
            n_top = work.sequence.params.prompt_logprobs or 0
            samples = []
            for first in range(0, len(work.token_ids), PREFILL_ROWS):
                ids = np.asarray(work.token_ids[first : first + PREFILL_ROWS], dtype=np.int32)
                batch = Batch.build([(work.sequence.slot, ids, work.start + first, Outputs.ALL)])
                for part in self._logit_parts(batch):
                    samples += [log_probabilities(row, next(targets), n_top) for row in part]
            return samples

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """See Runner.logits."""
        with self._running():
            self._check_room(len(token_ids))
            cache = PagedCache([layer.shape for layer in self._weights.layers], page_count(len(token_ids)) * PAGE, 1)
            parts: list[npt.NDArray[np.float32]] = []
            self._prefill.use(cache)
            try:
                for first in range(0, len(token_ids), PREFILL_ROWS):
                    ids = np.asarray(token_ids[first : first + PREFILL_ROWS], dtype=np.int32)
                    parts += self._logit_parts(Batch.build([(0, ids, first, Outputs.ALL)]))
            finally:
                self._prefill.use(self._cache)
                self._stream.synchronize()
            return np.concatenate(parts)

    def _logit_parts(self, batch: Batch) -> Iterator[npt.NDArray[np.float32]]:
        """Logits of all rows of a batch, LOGIT_ROWS at a time."""
        hidden_states(cast(ModelWeights, self._weights), cast(Any, self._prefill), batch)
        for first in range(0, batch.n_tokens, LOGIT_ROWS):
            wanted = min(LOGIT_ROWS, batch.n_tokens - first)
            n = padded_rows(wanted)  # rows behind the batch exist and are nobody's
            out = self._logit_rows[:n]
            self._prefill.logits(self._prefill_buffers.x[first : first + n], out)
            yield out[:wanted].get(stream=self._stream)

    def release(self, slot: int) -> None:
        """See Runner.release."""
        if self._closed or self._broken:
            return
        with self._running():
            self._loop.stop(slot)

    def memory_plan(self) -> MemoryPlan:
        """See Runner.memory_plan."""
        return memory_plan(self._plan, self.context_length)

    def read_bandwidth(self) -> float | None:
        """See Runner.read_bandwidth; measured on the first call."""
        with self._running():
            if self._bandwidth is None:
                self._bandwidth = rows.read_bandwidth(self._stream)
            return self._bandwidth

    def close(self) -> None:
        """See Runner.close."""
        if self._closed:
            return
        self._closed = True
        with self._device:
            if not self._broken:
                self._stream.synchronize()
            for name in (
                "_graphs",
                "_loop",
                "_prefill",
                "_slots",
                "_cache",
                "_attention",
                "_decode_buffers",
                "_prefill_buffers",
                "_logits",
                "_logit_rows",
                "_weights",
            ):
                if hasattr(self, name):
                    delattr(self, name)
            self._pool.free_all_blocks()

    # ---- surroundings ----------------------------------------------------------------------------------------

    def pool_bytes(self) -> int:
        """Device memory the runner's pool holds."""
        return int(self._pool.total_bytes())

    def _check_room(self, length: int) -> None:
        if length > self.context_length:
            raise ContextFullError(length, self.context_length)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        import cupy

        with self._device, cupy.cuda.using_allocator(self._pool.malloc), self._stream:
            yield

    @contextmanager
    def _running(self) -> Iterator[None]:
        """The device, stream and pool of this runner; a CUDA error marks it broken for good."""
        if self._broken:
            raise DeviceError(f"the GPU failed before ({self._broken}); open the model again")
        try:
            with _device_errors("running the model"), self._on_device():
                yield
        except DeviceError as error:
            if not isinstance(error.__cause__, MemoryError):  # out of memory leaves the device as it was
                self._broken = str(error)
            raise


def _buckets(slots: int) -> tuple[int, ...]:
    """Numbers of rows that decode steps are captured for: powers of two, and all slots."""
    return tuple(sorted({min(1 << power, slots) for power in range(slots.bit_length() + 1)}))


@contextmanager
def _device_errors(doing: str) -> Iterator[None]:
    """Turns what CuPy raises into DeviceError."""
    import cupy

    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise DeviceError(f"the GPU ran out of memory while {doing}: {error}") from error
    except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError) as error:
        raise DeviceError(f"the GPU failed while {doing}: {error}") from error


def device_weights(runner: CudaRunner) -> DeviceWeights:
    """The packed weights of an open runner, for profiles and comparisons."""
    return runner._weights
