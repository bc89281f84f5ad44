"""The model on one GPU behind the Runner protocol: prompts, decode steps, scores, and the way out when the GPU fails.

All device memory of a runner comes from a pool of its own, so that close() gives back exactly what it took and two open
models do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from engine.config import page_count
from engine.cuda import availability
from engine.cuda.attention.attention import PAGE, Attention, AttentionShape
from engine.cuda.attention.cache import PagedCache, SavedPages
from engine.cuda.driver import compiler
from engine.cuda.driver.failure import device_errors
from engine.cuda.driver.graphs import StepGraphs, buckets
from engine.cuda.driver.staging import Staging
from engine.cuda.launch_plan.families import Phase
from engine.cuda.launch_plan.jobs import kernel_jobs
from engine.cuda.launch_plan.model import Settings, describe
from engine.cuda.load.buffers import Activations
from engine.cuda.load.features import check_features
from engine.cuda.load.memory_plan import MIXED_ROWS, PREFILL_ROWS, fit, memory_plan, plan_of
from engine.cuda.load.uploader import Uploader
from engine.cuda.rows import rows
from engine.cuda.sampling.slots import DeviceSlots
from engine.cuda.step.decode_ops import DecodeOps
from engine.cuda.step.prompt import PromptReader
from engine.cuda.step.prompt_ops import PromptOps
from engine.cuda.step.prompt_products import PromptProducts
from engine.cuda.step.run_ahead import MOST_AHEAD, RunAhead
from engine.errors import ContextFullError, DeviceError, EngineError
from engine.model.batch import Batch, Outputs
from engine.model.loader import LoadedModel
from engine.model.memory import MemoryPlan
from engine.model.transformer import hidden_states
from engine.request import ActiveSequence, TokenSample, Work
from engine.sampling.logprobs import log_probabilities

PROMPT_BATCHES = 64
"""Batches of prompts that may draw in one step: a ring of results has room for these and the steps ahead."""


class CudaRunner:
    """One model on one GPU; see engine.runner.devices.Runner.

    Args:
        model: the loaded file; it may be closed once this returns.
        context_length: positions of one sequence.
        kv_type: "f16" or "f32".
        max_sequences: slots.
        cache_tokens: positions of all sequences together; None takes config.CONTEXTS contexts, or what the memory has.
        prefill_chunk: rows of prompts that run at once; None leaves the choice to plan.PREFILL_ROWS.
        deterministic: a row's bits depend on its own sequence alone, also where that costs speed.
        device_index: which GPU.
        status: told what takes long.
        eager: launch every decode step kernel by kernel instead of replaying a captured graph.

    Raises:
        DeviceError: no usable GPU, a part of the model without kernels, too little memory, a kernel that does not
            build.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        context_length: int,
        kv_type: str,
        max_sequences: int,
        cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
        deterministic: bool = False,
        device_index: int = 0,
        status: Callable[[str], None] = lambda _: None,
        eager: bool = False,
    ) -> None:
        reason = availability(device_index)
        if reason is not None:
            raise DeviceError(f"device 'cuda:{device_index}' cannot be used: {reason}")
        check_features(model)
        import cupy

        self.config = model.config
        self.context_length = context_length
        self.threads: int | None = None
        self._bandwidth: float | None = None
        self._broken: str | None = None
        self._closed = False
        self._device = cupy.cuda.Device(device_index)
        self._eager = eager
        self._unclear = False
        with self._device, device_errors("opening the model"):
            properties = cupy.cuda.runtime.getDeviceProperties(device_index)
            self.device_name = f"cuda:{device_index} ({properties['name'].decode()})"
            card = (compiler.device_arch(), int(properties["multiProcessorCount"]))
            for chunk in (prefill_chunk,) if prefill_chunk else PREFILL_ROWS:
                settings = Settings(kv_type == "f16", max_sequences, chunk, deterministic)
                self._launches = describe(model, card, settings)
                wanted = plan_of(model, self._launches, context_length=context_length, cache_tokens=cache_tokens)
                if wanted.total <= int(cupy.cuda.runtime.memGetInfo()[0]):
                    break
            self._plan = fit(wanted, int(cupy.cuda.runtime.memGetInfo()[0]))
            self.max_sequences = max_sequences
            self.n_pages = self._plan.pages
            self.lookahead = MOST_AHEAD - 1
            self.prefill_chunk = self._plan.prefill_rows
            self.mixed_chunk = min(MIXED_ROWS, self.prefill_chunk)
            self._pool = cupy.cuda.MemoryPool()
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._open(model, status)

    def _open(self, model: LoadedModel, status: Callable[[str], None]) -> None:
        """Everything that allocates."""
        import cupy

        try:
            with self._on_device():
                jobs, arch = kernel_jobs(self._launches), self._launches.card.arch
                total = model.weights_bytes
                uploader = Uploader(self._stream, lambda done: status(f"uploading weights {done * 100 // total} %"))
                # The compiler works without the GIL and without the device: it runs beside the upload.
                with ThreadPoolExecutor(max_workers=1) as side:
                    building = side.submit(compiler.prebuild, jobs, arch, status)
                    self._weights = uploader.model(model, self._launches)
                    building.result()
                del uploader
                self._pool.free_all_blocks()
                self._allocate()
                # No slot is active yet: this writes nothing, and loads the kernels of a single sequence.
                self._flush()
                self._graphs.launch(1)
                self._slots.count_launch()
                self._stream.synchronize()
        except cupy.cuda.memory.OutOfMemoryError as error:
            self._pool.free_all_blocks()
            raise DeviceError(f"the GPU ran out of memory while the model was opened: {error}") from error

    def _allocate(self) -> None:
        import cupy

        layers = self._weights.layers
        shapes = [layer.attention.shape for layer in layers]
        slots = self.max_sequences
        self._buckets = buckets(slots)
        # A batch's tokens, positions, slots and tiles; pages to copy. See Staging.place.
        words = 16 * self.prefill_chunk + 64 * slots + 4 * self.n_pages + 16 * len(layers)
        self._staging = Staging(self._stream, words)
        self._cache = PagedCache(shapes, self.n_pages, self.context_length, slots)
        self._attention: dict[AttentionShape, Attention] = {s: Attention(s, slots) for s in set(shapes)}
        self._decode_buffers = Activations(self._launches, Phase.DECODE)
        self._prefill_buffers = Activations(self._launches, Phase.PROMPT)
        self._logits = cupy.zeros((slots, self._launches.vocab), cupy.float32)
        places = 2 * MOST_AHEAD + PROMPT_BATCHES
        self._slots = DeviceSlots(self._launches.vocab, slots, self.context_length, places=places, stream=self._stream)
        self._products = products = PromptProducts(self._launches, self._prefill_buffers)
        self._prefill = PromptOps(self._weights, self._prefill_buffers, products, self._attention, self._staging)
        self._prefill.use(self._cache)
        self._prompts = PromptReader(self._weights, self._prefill, self._slots, self._staging, self._logits)
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(places)]
        self._graphs = StepGraphs(lambda n: self.run_step(self.decode_ops(n), n), self._stream, eager=self._eager)
        self._loop = RunAhead(
            enqueue=self._enqueue,
            set_position=self._slots.set_position,
            set_limit=self._slots.set_limit,
            buckets=self._buckets,
        )

    # ---- decode ----------------------------------------------------------------------------------------------

    def decode_ops(self, n: int, cache: PagedCache | None = None) -> DecodeOps:
        """The bricks of a decode step over rows 0..n-1, on the runner's own cache or another one."""
        return DecodeOps(
            self._weights,
            self._decode_buffers,
            cache or self._cache,
            self._attention,
            self._slots.tokens,
            self._slots.positions,
            n,
            prompts=self._products,
            expert_room=self._prefill_buffers.expert_room,  # prompts are not read while a decode step runs
        )

    def run_step(self, ops: DecodeOps, n: int) -> None:
        """All bricks of one decode step and its sampling, on the current stream."""
        x = hidden_states(self._weights, ops, None)
        ops.logits(x, self._logits[:n])
        self._slots.sample(self._logits[:n])

    def _enqueue(self, n: int) -> int:
        """One decode step over rows 0..n-1; returns the place of its results."""
        self._flush()
        self._graphs.launch(n)
        place = self._slots.count_launch()
        self._events[place].record(self._stream)
        return place

    def _flush(self) -> None:
        """What the host has changed is on the device before whatever is launched next."""
        self._cache.flush(self._staging)
        self._slots.flush(self._staging)
        self._staging.send()

    # ---- Runner ----------------------------------------------------------------------------------------------

    def step(self, work: Sequence[Work]) -> list[TokenSample | EngineError | None]:
        """See Runner.step.

        Decode steps are launched first, prompts behind them, and the decode step after the next behind those, which
        already feeds the first tokens that the prompts will have drawn; only then are results waited for.
        """
        with self._running(), self._whole():
            decode = [item for item in work if item.decode]
            prompts = [item for item in work if not item.decode]
            for item in decode:
                self._seat(item)
            self._loop.launch_needed(item.sequence.slot for item in decode)
            limits = {item.sequence.slot: self._open_pages(item) for item in prompts}
            drawn = self._prompts.feed(prompts, limits)
            for place, items in drawn:
                self._events[place].record(self._stream)
                for item in items:
                    slot = item.sequence.slot
                    end = item.start + len(item.token_ids)
                    self._loop.start(slot, item.sequence.request_id, end, None, limits[slot])
            self._loop.run_ahead()
            wanted: dict[int, list[tuple[int, ActiveSequence]]] = {}
            places = self._loop.take([item.sequence.slot for item in decode])
            for place, item in zip(places, decode, strict=True):
                wanted.setdefault(place, []).append((item.sequence.slot, item.sequence))
            results = self._read(wanted)
            results |= self._read(
                {place: [(column, item.sequence) for column, item in enumerate(items)] for place, items in drawn}
            )
            return [results.get(item.sequence.slot) for item in work]

    def _seat(self, item: Work) -> None:
        """A decode row has its pages and is on the device as the item says; mostly it is already."""
        sequence, token = item.sequence, item.token_ids[0]
        slot, start = sequence.slot, item.start
        self._cache.set_pages(slot, sequence.pages)
        limit = self._limit(sequence)
        if self._loop.holds(sequence, start, token):
            self._loop.extend(slot, limit)
            return
        assert len(item.token_ids) == 1, "a decode row feeds one token"
        self._check_room(start + 1)
        self._slots.begin(sequence, start, limit, token)
        self._loop.start(slot, sequence.request_id, start, token, limit)

    def _open_pages(self, item: Work) -> int:
        """A prompt's slot reads its pages; returns _limit()."""
        sequence, end = item.sequence, item.start + len(item.token_ids)
        self._check_room(end)
        assert len(sequence.pages) * PAGE >= end, "a prompt without pages for its tokens"
        self._loop.stop(sequence.slot)
        self._cache.set_pages(sequence.slot, sequence.pages)
        return self._limit(sequence)

    def _limit(self, sequence: ActiveSequence) -> int:
        """The first position that a row must not feed ahead: it has no page for it, or no use."""
        limit = min(len(sequence.pages) * PAGE, self.context_length)
        return limit if sequence.end is None else min(limit, sequence.end)

    def _read(self, wanted: dict[int, list[tuple[int, ActiveSequence]]]) -> dict[int, TokenSample | EngineError]:
        """Results by slot, of (column, sequence) by place; waits for them."""
        found: dict[int, TokenSample | EngineError] = {}
        for place, entries in wanted.items():
            self._events[place].synchronize()
            for (_, sequence), sample in zip(entries, self._slots.read(place, entries), strict=True):
                found[sequence.slot] = sample
                if isinstance(sample, TokenSample):
                    self._loop.learn(sequence.slot, sample.token_id)
                else:
                    self._loop.stop(sequence.slot)
        return found

    def score(self, work: Work) -> list[TokenSample]:
        """See Runner.score."""
        with self._running(), self._whole():
            self._open_pages(work)
            targets = iter(work.sequence.prompt_ids[work.start + 1 :])
            n_top = work.sequence.params.prompt_logprobs or 0
            samples = []
            for first in range(0, len(work.token_ids), self.prefill_chunk):
                ids = np.asarray(work.token_ids[first : first + self.prefill_chunk], dtype=np.int32)
                batch = Batch.build([(work.sequence.slot, ids, work.start + first, Outputs.ALL)])
                for part in self._prompts.all_logits(batch):
                    samples += [log_probabilities(row, next(targets), n_top) for row in part]
            return samples

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """See Runner.logits."""
        with self._running():
            self._check_room(len(token_ids))
            pages = page_count(len(token_ids))
            cache = PagedCache([layer.attention.shape for layer in self._weights.layers], pages, len(token_ids), 1)
            cache.set_pages(0, list(range(pages)))
            parts: list[npt.NDArray[np.float32]] = []
            self._prefill.use(cache)
            try:
                for first in range(0, len(token_ids), self.prefill_chunk):
                    ids = np.asarray(token_ids[first : first + self.prefill_chunk], dtype=np.int32)
                    parts += self._prompts.all_logits(Batch.build([(0, ids, first, Outputs.ALL)]))
            finally:
                self._prefill.use(self._cache)
                self._stream.synchronize()
            return np.concatenate(parts)

    def release(self, slot: int) -> None:
        """See Runner.release. Takes effect with the next launch, before anything that launch writes."""
        if not (self._closed or self._broken):
            self._loop.stop(slot)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See Runner.copy_pages."""
        with self._running():
            self._cache.copy_pages(pairs, self._staging)

    def save_pages(self, pages: Sequence[int]) -> SavedPages:
        """See Runner.save_pages; the copy is under way when this returns."""
        with self._running():
            return self._cache.save_pages(pages, self._staging)

    def load_pages(self, saved: SavedPages, pages: Sequence[int]) -> None:
        """See Runner.load_pages."""
        with self._running():
            self._cache.load_pages(saved, pages, self._staging)

    def memory_plan(self) -> MemoryPlan:
        """See Runner.memory_plan."""
        return memory_plan(self._plan)

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
                "_prompts",
                "_prefill",
                "_products",
                "_staging",
                "_slots",
                "_cache",
                "_attention",
                "_decode_buffers",
                "_prefill_buffers",
                "_logits",
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
    def _whole(self) -> Iterator[None]:
        """A step cut short, by an error or an interrupt, leaves no row running: the next one begins them anew."""
        if self._unclear:
            self._staging.drop()
            self._loop.clear()
            self._slots.reset()
            self._cache.touch()
        self._unclear = True
        yield
        self._unclear = False

    @contextmanager
    def _running(self) -> Iterator[None]:
        """The device, stream and pool of this runner; a CUDA error marks it broken for good."""
        if self._broken:
            raise DeviceError(f"the GPU failed before ({self._broken}); open the model again")
        try:
            with device_errors("running the model"), self._on_device():
                yield
        except DeviceError as error:
            if not isinstance(error.__cause__, MemoryError):  # out of memory leaves the device as it was
                self._broken = str(error)
            raise
