"""Prompts on the GPU: pieces of several sequences in one batch, and the first token of those that end in it.

Everything a batch needs from the host goes in one upload, and nothing here waits: the tokens drawn are fetched later.
Must not know the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from engine.config import STATE_BORDER, piece_end
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.graphs import Graphs
from engine.cuda.driver.staging import Staging
from engine.cuda.load.device_weights import DeviceWeights
from engine.cuda.load.memory_plan import LOGIT_ROWS
from engine.cuda.recurrent.state_cache import StateCache
from engine.cuda.rows import parts
from engine.cuda.sampling.slots import DeviceSlots
from engine.cuda.step.prompt_ops import PromptOps
from engine.model.batch import Batch, Outputs
from engine.model.transformer import begun_states, hidden_states
from engine.request import Work


@dataclass(frozen=True)
class Piece:
    """Tokens first..end-1 of a work item."""

    work: Work
    first: int
    end: int

    @property
    def draws(self) -> bool:
        """Whether the token after it is wanted."""
        return self.work.sample and self.end == len(self.work.token_ids)


def pack(work: Sequence[Work], rows: int, border: int = 1) -> Iterator[list[Piece]]:
    """Cuts work into batches of at most that many rows, in order; see config.piece_end for the border."""
    batch: list[Piece] = []
    room = rows
    for item in work:
        first, length, start = 0, len(item.token_ids), item.start
        while first < length:
            end = piece_end(start + first, start + first + room, start + length, border) - start
            if end > first:
                batch.append(Piece(item, first, end))
                room -= end - first
                first = end
            if first < length or room == 0:
                yield batch
                batch, room = [], rows
    if batch:
        yield batch


class PromptReader:
    """Feeds prompts.

    Args:
        weights: the model.
        ops: the bricks; ops.buffers says how many rows a batch may have.
        slots: sampling state.
        states: recurrent states, or None.
        staging: the way to the device.
        logits: float32 (slots, V), overwritten.
        graphs: replays batches of the same shape.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        ops: PromptOps,
        slots: DeviceSlots,
        states: StateCache | None,
        staging: Staging,
        logits: DeviceArray,
        graphs: Graphs,
    ) -> None:
        import cupy

        self._weights, self._ops, self._slots, self._states = weights, ops, slots, states
        self._staging, self._logits, self._graphs = staging, logits, graphs
        self.logit_rows = cupy.zeros((LOGIT_ROWS, logits.shape[1]), cupy.float32)

    def hidden(self, batch: Batch) -> DeviceArray:
        """The residual stream (rows, D) behind a batch; valid until the next one."""
        x: DeviceArray = hidden_states(self._weights, self._ops, batch)
        return x

    def feed(self, work: Sequence[Work], limits: dict[int, int]) -> list[tuple[int, list[Work]]]:
        """Launches all batches of prompt pieces.

        Args:
            work: items whose slots know their pages.
            limits: by slot, the first position the row may not feed; for those that draw.

        Returns:
            For every batch that draws: the place of its results and the items, one per column.
        """
        drawn = []
        for pieces in pack(work, self._ops.buffers.rows, 1 if self._states is None else STATE_BORDER):
            ending = [piece.work for piece in pieces if piece.draws]
            if self._states is not None:
                for item in ending:
                    end = item.start + len(item.token_ids)
                    self._states.seat(item.sequence.slot, item.sequence.state_place + 1, end)
                self._states.flush(self._staging)
            batch = prompt_batch(pieces)
            self._ops.begin(batch, narrow=True)
            # A later part of an item changes the state that the part before has left.
            again = self._states is None or all(piece.first == 0 for piece in pieces)
            self._graphs.launch(self._ops.shape, partial(self._launch, batch, len(ending)), again=again)
            # Only sampling reads what follows, so the host makes it while the device works.
            for item in ending:
                slot, end = item.sequence.slot, item.start + len(item.token_ids)
                self._slots.begin(item.sequence, end - 1, limits[slot])
            self._slots.flush(self._staging)
            self._staging.send()
            if ending:
                # Not in the graph: it has masks as an argument once there are some.
                self._slots.sample_rows(self._logits[: len(ending)], self._ops.output_slots)
                drawn.append((self._slots.count_launch(), ending))
        return drawn

    def _launch(self, batch: Batch, n: int) -> None:
        """All launches of a batch up to the logits of the n sequences that draw a token."""
        x = begun_states(self._weights, self._ops, batch)
        if n:
            self._ops.logits(self._ops.output_states(x), self._logits[:n])

    def all_logits(self, batch: Batch) -> Iterator[npt.NDArray[np.float32]]:
        """Logits of all rows of a batch on the host, LOGIT_ROWS at a time."""
        self.hidden(batch)
        buffers = self._ops.buffers
        for first in range(0, batch.n_tokens, LOGIT_ROWS):
            wanted = min(LOGIT_ROWS, batch.n_tokens - first)
            out = self.logit_rows[:wanted]
            self._ops.logits(buffers.x[first : first + wanted], out)
            yield out.get()

    def all_vectors(self, batch: Batch) -> Iterator[npt.NDArray[np.float32]]:
        """Vectors of all rows of a batch behind the last norm, on the host."""
        x, norm = self.hidden(batch), self._weights.output_norm
        if norm is not None:
            parts.normalize(x, x, norm)
        yield x.get()


def prompt_batch(pieces: Sequence[Piece]) -> Batch:
    """The pieces as one batch; logits of the last row of each piece that draws."""
    return Batch.build(
        (
            piece.work.sequence.slot,
            piece.work.token_ids[piece.first : piece.end],
            piece.work.start + piece.first,
            Outputs.LAST if piece.draws else Outputs.NONE,
            None,
            *state_places(piece.work, piece.first),
        )
        for piece in pieces
    )


def text_batches(texts: Sequence[Sequence[int]], rows: int, border: int = 1) -> Iterator[Batch]:
    """Whole texts, text i in slot i, as batches of at most that many rows, in order; all rows are wanted.

    See config.piece_end for the border.
    """
    pieces: list[tuple[int, npt.NDArray[np.int32], int, Outputs, None, int, int]] = []
    room = rows
    for slot, ids in enumerate(texts):
        first = 0
        while first < len(ids):
            end = piece_end(first, first + room, len(ids), border)
            if end > first:
                # Nothing here is run again: the state may stay in its place.
                piece = np.asarray(ids[first:end], dtype=np.int32)
                pieces.append((slot, piece, first, Outputs.ALL, None, min(first, 1), 1))
                first, room = end, room - (end - first)
            if first < len(ids) or room == 0:
                yield Batch.build(pieces)
                pieces, room = [], rows
    if pieces:
        yield Batch.build(pieces)


def state_places(work: Work, first: int) -> tuple[int, int]:
    """Places of the state that a piece of a work item, from its token `first` on, reads and writes.

    The item as a whole moves the state by one place, in however many batches.
    """
    place = work.sequence.state_place
    return (place if first == 0 else place + 1), place + 1
