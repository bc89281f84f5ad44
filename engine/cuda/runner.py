"""The model on one GPU behind the Runner protocol: prompts, decode steps, scores, and what a failure leaves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from traceback import clear_frames

import numpy as np
import numpy.typing as npt

from engine.config import STATE_BORDER, KvType, Target, checkpoint_count, page_count
from engine.cuda import availability
from engine.cuda.attention.cache import MOST_TEXTS, PagedCache
from engine.cuda.driver.context import GpuContext
from engine.cuda.driver.failure import device_errors
from engine.cuda.driver.row_store import SavedRows
from engine.cuda.launch_plan.ahead import MOST_AHEAD
from engine.cuda.launch_plan.model import LaunchPlan, Settings
from engine.cuda.load.features import check_features
from engine.cuda.load.memory_plan import (
    MIXED_ROWS,
    MIXED_ROWS_PER_SEQUENCE,
    SHORTEST_KNOWN,
    SHORTEST_PIECE,
    choose,
    memory_plan,
)
from engine.cuda.load.opening import load_weights
from engine.cuda.profile import REPEATS, profile_decode
from engine.cuda.recurrent.state_cache import DeviceStates, StateCache
from engine.cuda.rows import rows
from engine.cuda.step.machine import StepMachine
from engine.cuda.step.prompt import state_places, text_batches
from engine.cuda.step.run_ahead import RunAhead
from engine.cuda.step.seats import Seats
from engine.errors import DeviceError, EngineError, InvalidRequestError
from engine.model.batch import Batch, Outputs
from engine.model.brick_time import BrickTime
from engine.model.cache import StateRows
from engine.model.config import Pooling
from engine.model.loader import LoadedModel
from engine.model.memory import MemoryPlan
from engine.model.pooling import pooled
from engine.request import ActiveSequence, TokenSample, Work
from engine.sampling.logprobs import log_probabilities

TEXT_BATCHES = 4
"""Batches of one call of vectors() of a model that makes embeddings alone: the host prepares one while another runs."""


class CudaRunner:
    """One model on one GPU; see engine.runner.protocol.Runner.

    Args:
        model: the loaded file; it may be closed once this returns.
        context_length: positions of one sequence.
        kv_type: number format of the cache, a KvType or its value.
        max_sequences: slots; None: as many as the cache has room for, see load.memory_plan.choose.
        cache_tokens: positions of all sequences together; None: as many as most of the free memory holds.
        prefill_chunk: rows of prompts that run at once; None leaves the choice to load.memory_plan.PREFILL_ROWS.
        checkpoints: copies of recurrent states kept for later prompts; None takes what config.checkpoint_count says.
        target: config.Target; how many rows of prompts run beside decode steps, and the ranges of their attention.
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
        kv_type: KvType | str,
        max_sequences: int | None = None,
        cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
        checkpoints: int | None = None,
        target: str = Target.BALANCED,
        deterministic: bool = False,
        device_index: int = 0,
        status: Callable[[str], None] = lambda _: None,
        eager: bool = False,
    ) -> None:
        reason = availability(device_index)
        if reason is not None:
            raise DeviceError(f"device 'cuda:{device_index}' cannot be used: {reason}")
        check_features(model, KvType.parse(kv_type))
        self.config = model.config
        self.context_length = context_length
        self.threads: int | None = None
        self.lookahead = MOST_AHEAD - 1
        self.states: DeviceStates | None = None
        if prefill_chunk is not None and model.config.state_bytes:
            prefill_chunk = max(prefill_chunk, STATE_BORDER)
        self._bandwidth: float | None = None
        self._closed = False
        self._unclear = False
        with device_errors("opening the model"):
            self._gpu = GpuContext(device_index)
            card = self._gpu.arch, self._gpu.multiprocessors
            launches, self._plan = choose(
                model,
                card,
                Settings(
                    KvType.parse(kv_type),
                    max_sequences or 0,
                    prefill_chunk or 0,
                    deterministic,
                    throughput=target == Target.THROUGHPUT,
                ),
                self._gpu.free_bytes(),
                context_length=context_length,
                cache_tokens=cache_tokens,
                checkpoints=checkpoints,
                default_sequences=max_sequences is None,
                default_rows=prefill_chunk is None,
            )
            self.max_sequences = launches.settings.max_sequences
            self.known_room: Callable[[int, int], int] | None = launches.known_room if launches.known_rows else None
            self.shortest_piece = SHORTEST_PIECE if self.known_room is None else SHORTEST_KNOWN
            self.device_name = self._gpu.name
            self.n_pages = self._plan.pages
            self.prefill_chunk = self._plan.prefill_rows
            mixed = self.prefill_chunk if target == Target.THROUGHPUT else MIXED_ROWS
            self.mixed_chunk = min(mixed, self.prefill_chunk)
            self.mixed_per_sequence = MIXED_ROWS_PER_SEQUENCE if target == Target.BALANCED else 0
            self.text_tokens = self.prefill_chunk * (1 if launches.generates else TEXT_BATCHES)
            self.most_texts = self.max_sequences if launches.generates else MOST_TEXTS * TEXT_BATCHES
            kept = checkpoint_count(checkpoints, self.max_sequences)
            try:
                self._machine = self._open(model, launches, status, n_checkpoints=kept, eager=eager)
            except BaseException as error:
                clear_frames(error.__traceback__)  # the locals of the calls that failed hold what they allocated
                gc.collect()
                self._gpu.release()
                raise
        if self._machine.states is not None:
            self.states = DeviceStates(self._machine.states, self._machine.staging, self._running)
        self._loop = RunAhead(
            enqueue=self._machine.enqueue,
            enqueue_chosen=self._machine.enqueue_chosen,
            forward=self._machine.enqueue_forward,
            forward_known=self._machine.enqueue_known,
            sample=self._machine.enqueue_sampling,
            set_position=self._machine.set_position,
            set_limit=self._machine.set_limit,
            step_sizes=self._machine.step_sizes,
            turns=launches.turns,
        )
        self._seats = Seats(self._machine, self._loop, context_length)

    def _open(
        self,
        model: LoadedModel,
        launches: LaunchPlan,
        status: Callable[[str], None],
        *,
        n_checkpoints: int,
        eager: bool,
    ) -> StepMachine:
        """Everything that allocates."""
        gpu = self._gpu
        with gpu.active():
            weights = load_weights(model, launches, gpu, status)
            machine = StepMachine(
                weights,
                n_pages=self.n_pages,
                context_length=self.context_length,
                n_checkpoints=n_checkpoints,
                stream=gpu.stream,
                eager=eager,
            )
            if machine.texts is None:
                machine.enqueue(1)  # no slot is active yet: this writes nothing, and loads the kernels of one sequence
            else:
                machine.texts.vectors([[0]], Pooling.MEAN)
            gpu.stream.synchronize()
            return machine

    # ---- Runner ----------------------------------------------------------------------------------------------

    def step(self, work: Sequence[Work]) -> list[TokenSample | EngineError | None]:
        """See Runner.step.

        Decode steps are launched first, prompts behind them, and the decode step after the next behind those, which
        already feeds the first tokens that the prompts will have drawn; only then are results waited for. Known tokens
        of a sequence are rows of that last step, before the token behind them.
        """
        with self._running(), self._whole():
            results: dict[int, TokenSample | EngineError] = {}
            rows = [item for item in work if item.decode]
            self._seats.seat(rows)
            decode = self._seats.send_masks([item for item in rows if item.sample], results)
            prompts = [item for item in work if not item.decode and self._seats.send_mask(item, results)]
            slots = [item.sequence.slot for item in decode]
            known = [item for item in rows if not item.sample]
            self._loop.feed([item.sequence.slot for item in known])
            for item in known:
                self._seats.pass_over(item)
            self._loop.launch_needed(slots)  # behind all that the host can do while the device works
            if prompts:
                self._loop.forget_prepared()
            limits = {item.sequence.slot: self._seats.open_pages(item) for item in prompts}
            drawn = self._machine.prompts.feed(prompts, limits)
            for place, items in drawn:
                self._machine.record(place)
                for item in items:
                    slot = item.sequence.slot
                    end = item.start + len(item.token_ids)
                    masked = item.sequence.mask is not None
                    self._loop.start(slot, item.sequence.request_id, end, None, limits[slot], masked=masked)
            self._loop.run_ahead()
            wanted: dict[int, list[tuple[int, ActiveSequence]]] = {}
            for (place, column), item in zip(self._loop.take(slots), decode, strict=True):
                wanted.setdefault(place, []).append((column, item.sequence))
            results |= self._seats.read(wanted)
            results |= self._seats.read(
                {place: [(column, item.sequence) for column, item in enumerate(items)] for place, items in drawn}
            )
            return [results.get(item.sequence.slot) for item in work]

    def score(self, work: Work) -> list[TokenSample]:
        """See Runner.score."""
        with self._running(), self._whole():
            self._seats.open_pages(work)
            targets = iter(work.sequence.prompt_ids[work.start + 1 :])
            n_top = work.sequence.params.prompt_logprobs or 0
            samples = []
            for first in range(0, len(work.token_ids), self.prefill_chunk):
                ids = np.asarray(work.token_ids[first : first + self.prefill_chunk], dtype=np.int32)
                places = state_places(work, first)
                batch = Batch.build([(work.sequence.slot, ids, work.start + first, Outputs.ALL, None, *places)])
                for part in self._machine.prompts.all_logits(batch):
                    samples += [log_probabilities(row, next(targets), n_top) for row in part]
            return samples

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """See Runner.logits."""
        with self._running():
            return self._apart([token_ids], self._machine.prompts.all_logits)[0]

    def vectors(self, texts: Sequence[Sequence[int]], pooling: Pooling) -> list[npt.NDArray[np.float32]]:
        """See Runner.vectors."""
        found: list[npt.NDArray[np.float32]] = []
        with self._running():
            if self._machine.texts is not None:
                return self._machine.texts.vectors(texts, pooling)
            for first in range(0, len(texts), self.max_sequences):
                found += self._apart(texts[first : first + self.max_sequences], self._machine.prompts.all_vectors)
        return [pooled(text, pooling) for text in found]

    def _apart(
        self, texts: Sequence[Sequence[int]], rows_of: Callable[[Batch], Iterable[npt.NDArray[np.float32]]]
    ) -> list[npt.NDArray[np.float32]]:
        """Rows of all tokens of each text, of at most max_sequences texts, over a cache of their own."""
        for ids in texts:
            self._seats.check_room(len(ids))
        plan, ends = self._machine.weights.plan, np.cumsum([page_count(len(ids)) for ids in texts]).tolist()
        cache = PagedCache(plan.cache_shapes, ends[-1], max(map(len, texts)), len(texts), plan.cache_layers)
        for slot, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            cache.set_pages(slot, list(range(first, end)))
        states = None if self.states is None else StateCache(plan.state_shapes, StateRows(len(texts), 2, 0))
        parts: list[list[npt.NDArray[np.float32]]] = [[] for _ in texts]
        self._machine.prompt_ops.use(cache, states)
        try:
            for batch in text_batches(texts, self.prefill_chunk, 1 if states is None else STATE_BORDER):
                rows = np.concatenate(list(rows_of(batch)))
                for span in batch.spans:
                    parts[span.slot].append(rows[span.row : span.row + span.n_rows])
        finally:
            self._machine.prompt_ops.use(self._machine.cache, self._machine.states)
            self._gpu.stream.synchronize()
        return [np.concatenate(pieces) for pieces in parts]

    def release(self, slot: int) -> None:
        """See Runner.release. Takes effect with the next launch, before anything that launch writes."""
        if not (self._closed or self._gpu.broken or self._gpu.forked):
            self._loop.stop(slot)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See Runner.copy_pages."""
        with self._running():
            self._machine.cache.copy_pages(pairs, self._machine.staging)

    def save_pages(self, pages: Sequence[int]) -> SavedRows:
        """See Runner.save_pages; the copy is under way when this returns."""
        with self._running():
            return self._machine.cache.save_pages(pages, self._machine.staging)

    def load_pages(self, saved: SavedRows, pages: Sequence[int]) -> None:
        """See Runner.load_pages."""
        with self._running():
            self._machine.cache.load_pages(saved, pages, self._machine.staging)

    def memory_plan(self) -> MemoryPlan:
        """See Runner.memory_plan."""
        return memory_plan(self._plan)

    def read_bandwidth(self) -> float | None:
        """See Runner.read_bandwidth; measured on the first call."""
        with self._running():
            if self._bandwidth is None:
                self._bandwidth = rows.read_bandwidth(self._gpu.stream)
            return self._bandwidth

    def profile(self, depth: int, n_rows: int, *, repeats: int = REPEATS) -> list[BrickTime]:
        """See Runner.profile. repeats: replays of each brick; the median counts."""
        if not (1 <= n_rows <= self.max_sequences and 0 <= depth < self.context_length - 1):
            raise InvalidRequestError(
                f"a profile of {n_rows} sequences at depth {depth}; allowed are 1 to {self.max_sequences} sequences "
                f"and a depth of 0 to {self.context_length - 2}"
            )
        if not self._machine.weights.plan.generates:
            raise InvalidRequestError("a profile is of decode steps, which a model that makes embeddings alone has not")
        if not self._loop.idle:
            raise InvalidRequestError("a profile needs an idle model: wait for the running requests, or cancel them")
        with self._running(), self._whole():
            try:
                return profile_decode(self._machine, self._gpu.stream, self.context_length, depth, n_rows, repeats)
            finally:
                self._gpu.pool.free_all_blocks()

    def close(self) -> None:
        """See Runner.close. What an interrupt or an error has left undone, a second call does.

        Raises:
            DeviceError: the GPU failed in one of the last steps, which no call has told yet; the model is closed.
        """
        if self._closed or self._gpu.forked:  # in the child of a fork nothing is freed: CUDA would be called
            return
        known, failure = self._gpu.broken, None
        try:
            with device_errors("closing the model"), self._gpu.device:
                if not known:
                    self._gpu.stream.synchronize()
        except DeviceError as error:
            failure, self._gpu.broken = error, str(error)
        self.states = None
        self._machine.close()
        try:
            with device_errors("closing the model"):
                self._gpu.release()
        except DeviceError as error:  # of a GPU that has failed nothing more can be given back
            failure = failure or error
        self._closed = True
        if failure is not None and not known:
            raise failure

    # ---- surroundings ----------------------------------------------------------------------------------------

    def pool_bytes(self) -> int:
        """Device memory the runner's pool holds."""
        return int(self._gpu.pool.total_bytes())

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A step cut short, by an error or an interrupt, leaves no row running: the next one begins them anew."""
        if self._unclear:
            self._loop.clear()
            self._machine.reset()
        self._unclear = True
        yield
        self._unclear = False

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Every use of the device: see GpuContext.running and StepMachine.settle."""
        if self._closed:
            raise DeviceError("the model is closed; open it again")
        with self._gpu.running():
            self._machine.settle()
            yield
