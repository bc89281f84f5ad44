"""Everything of one model that is on the GPU, and what launches its steps: weights, cache, buffers, slots, graphs.

Must not know which requests are scheduled, or how far a row may run ahead.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from engine.config import step_sizes
from engine.cuda.attention.attention import Attention, AttentionShape
from engine.cuda.attention.cache import PagedCache
from engine.cuda.attention.step_rows import KnownToken, StepRows
from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.graphs import Graphs
from engine.cuda.driver.staging import Staging
from engine.cuda.launch_plan.ahead import MOST_AHEAD, STATE_PLACES
from engine.cuda.launch_plan.families import Phase
from engine.cuda.load.buffers import Activations
from engine.cuda.load.device_weights import DeviceWeights
from engine.cuda.recurrent.state_cache import StateCache
from engine.cuda.sampling.slots import DeviceSlots
from engine.cuda.step.decode_ops import DecodeOps
from engine.cuda.step.indexer import Indexers
from engine.cuda.step.prompt import PromptReader
from engine.cuda.step.prompt_ops import PromptOps
from engine.cuda.step.prompt_products import PromptProducts
from engine.cuda.step.texts import TextReader
from engine.model.cache import StateRows
from engine.model.transformer import hidden_states

PROMPT_BATCHES = 64
"""Batches of prompts that may draw in one step: a ring of results has room for these and the steps ahead."""

_PROMPT_GRAPHS = 32
"""Batches of prompts come in more shapes than steps; of so many the graphs are kept."""


class StepMachine:
    """Steps of a model on the current device; everything is allocated here.

    Args:
        weights: the model.
        n_pages: pages of the cache.
        n_checkpoints: copies of recurrent states kept for later prompts.
        context_length: positions of one sequence.
        stream: the current stream.
        eager: launch every decode step kernel by kernel instead of replaying a captured graph.

    Attributes:
        weights: as given. cache: keys and values. states: recurrent states; None where the model has none.
        slots: tokens, positions and sampling of every slot.
        staging: the way from the host. logits: float32 (rows, V) of the last step.
        prompts: feeds prompts. prompt_ops: their bricks.
        texts: reads whole texts; only of a model that makes embeddings alone, of which nothing else runs.
        step_sizes: numbers of rows that decode steps may have, ascending.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        *,
        n_pages: int,
        context_length: int,
        stream: Stream,
        eager: bool,
        n_checkpoints: int = 0,
    ) -> None:
        import cupy

        plan = weights.plan
        slots, rows, vocab = plan.settings.max_sequences, plan.settings.prefill_rows, plan.vocab
        # A model that makes embeddings alone keeps nothing of a sequence.
        shapes = plan.cache_shapes if plan.generates else (None,) * len(plan.layers)
        # A batch's tokens, positions, slots and tiles; pages to copy. See Staging.place.
        words = 16 * rows + 64 * slots + 4 * n_pages + 16 * len(weights.layers)
        places = 2 * MOST_AHEAD + PROMPT_BATCHES
        self.weights = weights
        self.staging = Staging(stream, words)
        self.cache = PagedCache(shapes, n_pages, context_length, slots, plan.cache_layers)
        self.states: StateCache | None = None
        if any(plan.state_shapes):
            self.states = StateCache(plan.state_shapes, StateRows(slots, STATE_PLACES, n_checkpoints))
        self._attention: dict[AttentionShape, Attention] = {
            shape: Attention(shape, plan.decode_rows)
            for shape in dict.fromkeys(plan.attention_shapes)
            if shape is not None
        }
        self._indexers = Indexers(plan, context_length)
        self._decode_buffers = Activations(plan, Phase.DECODE)
        self._prompt_buffers = Activations(plan, Phase.PROMPT)
        self.logits = cupy.zeros((plan.decode_rows, vocab), cupy.float32)
        self._step_rows = StepRows(plan.decode_rows, plan.known_rows, context_length) if plan.known_rows else None
        self.slots = DeviceSlots(vocab, slots, context_length, places=places, stream=stream)
        self._products = PromptProducts(plan, self._prompt_buffers)
        self.prompt_ops = PromptOps(
            weights, self._prompt_buffers, self._products, self._attention, self._indexers, self.staging
        )
        self.prompt_ops.use(self.cache, self.states)
        # CuPy refuses cuBLAS calls in a stream that is captured.
        by_hand = eager or plan.dense
        self.prompts = PromptReader(
            weights,
            self.prompt_ops,
            self.slots,
            self.states,
            self.staging,
            self.logits,
            Graphs(stream, eager=by_hand, most=_PROMPT_GRAPHS),
        )
        self.texts = None if plan.generates else TextReader(weights, self.prompt_ops, context_length)
        self.step_sizes = step_sizes(slots)
        self._stream = stream
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(places)]
        self._graphs = Graphs(stream, eager=eager)
        self._forward_graphs = Graphs(stream, eager=eager)
        self._known_graphs = Graphs(stream, eager=eager)
        self._chosen_graphs = Graphs(stream, eager=eager)

    def decode_ops(
        self,
        n: int,
        cache: PagedCache | None = None,
        states: StateCache | None = None,
        *,
        rows: StepRows | None = None,
        known: bool = False,
    ) -> DecodeOps:
        """The bricks of a decode step of n rows, on the machine's own caches or other ones; see DecodeOps."""
        return DecodeOps(
            self.weights,
            self._decode_buffers,
            cache or self.cache,
            states or self.states,
            self._attention,
            self.slots.tokens,
            self.slots.positions,
            n,
            indexers=self._indexers,
            rows=rows,
            known=known,
            prompts=self._products,
            expert_room=self._prompt_buffers.expert_room,  # prompts are not read while a decode step runs
        )

    def run_step(self, ops: DecodeOps, n: int, slots: DeviceArray | None = None) -> None:
        """All bricks of one decode step and its sampling, on the current stream. slots: see DeviceSlots.sample."""
        self.run_forward(ops, n)
        self.slots.sample(self.logits[:n], slots)

    def run_chosen(self, n: int) -> None:
        """run_step() over the n rows that were put into the machine's StepRows."""
        rows = self._step_rows
        assert rows is not None
        self.run_step(self.decode_ops(n, rows=rows), n, rows.chosen[:n])

    def run_known(self, n: int) -> None:
        """run_forward() over such rows, of which some are known tokens."""
        self.run_forward(self.decode_ops(n, rows=self._step_rows, known=True), n)

    def run_forward(self, ops: DecodeOps, n: int) -> None:
        """All bricks of one decode step without its sampling."""
        x = hidden_states(self.weights, ops, None)
        ops.logits(x, self.logits[:n])

    def enqueue(self, n: int) -> int:
        """One decode step over rows 0..n-1; returns the place of its results."""
        self.flush()
        self._graphs.launch(n, lambda: self.run_step(self.decode_ops(n), n))
        place = self.slots.count_launch()
        self.record(place)
        return place

    def enqueue_chosen(self, slots: Sequence[int]) -> int:
        """One decode step whose rows are those of these slots, in this order; returns the place of its results."""
        rows, size = self._step_rows, self.step_sizes[bisect_left(self.step_sizes, len(slots))]
        assert rows is not None, "rows are those of the first slots"
        rows.put(size, slots, [], self.staging)
        self.flush()
        self._chosen_graphs.launch(size, lambda: self.run_chosen(size))
        place = self.slots.count_launch()
        self.record(place)
        return place

    def enqueue_forward(self, n: int) -> None:
        """A decode step over rows 0..n-1 without its sampling, which enqueue_sampling() adds. It may be repeated."""
        self.flush()
        self._forward_graphs.launch(n, lambda: self.run_forward(self.decode_ops(n), n))

    def enqueue_known(self, n: int, known: Sequence[KnownToken]) -> None:
        """enqueue_forward() over slots 0..n-1 that feeds these tokens too, each before a later one of its slot."""
        rows, sizes = self._step_rows, self.weights.plan.known_sizes
        assert rows is not None, "no rows beside the slots"
        size = sizes[bisect_left(sizes, n + len(known))]
        rows.put(size, range(n), known, self.staging)
        self.flush()
        self._known_graphs.launch(size, lambda: self.run_known(size))

    def enqueue_sampling(self, n: int) -> int:
        """Draws the tokens of enqueue_forward() with the masks of now; returns the place of the results."""
        self.flush()
        self.slots.sample_masked(self.logits[:n])
        place = self.slots.count_launch()
        self.record(place)
        return place

    def record(self, place: int) -> None:
        """The results of that place are complete once what has been launched so far has run."""
        self._events[place].record(self._stream)

    def wait(self, place: int) -> None:
        """Waits for the results of a place."""
        self._events[place].synchronize()

    def set_position(self, slot: int, position: int) -> None:
        """See DeviceSlots.set_position."""
        self.slots.set_position(slot, position)

    def set_limit(self, slot: int, limit: int) -> None:
        """See DeviceSlots.set_limit."""
        self.slots.set_limit(slot, limit)

    def flush(self) -> None:
        """What the host has changed is on the device before whatever is launched next."""
        self.cache.flush(self.staging)
        self.slots.flush(self.staging)
        if self.states is not None:
            self.states.flush(self.staging)
        self.staging.send()

    def settle(self) -> None:
        """What a call that was cut short has left behind does not reach the next one. First thing in every call."""
        self.staging.drop()
        self.prompt_ops.use(self.cache, self.states)

    def reset(self) -> None:
        """Forgets what was on its way: no slot runs, and the page table is sent again. Waits for the device."""
        self.staging.drop()
        self.slots.reset()
        self.cache.touch()
        if self.states is not None:
            self.states.forget()

    def close(self) -> None:
        """Drops every array; captured graphs refer to the machine, so references alone would not free them."""
        vars(self).clear()
