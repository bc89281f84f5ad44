"""The new tokens of one step: flat rows of one or more sequences. Integers only, no device."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


class Outputs(Enum):
    """Rows of a span whose logits are wanted."""

    NONE = "none"
    LAST = "last"
    ALL = "all"


Ids = Sequence[int] | Int32Array
Part = (
    tuple[int, Ids, int, Outputs]
    | tuple[int, Ids, int, Outputs, Sequence[int] | None]
    | tuple[int, Ids, int, Outputs, Sequence[int] | None, int | None]
    | tuple[int, Ids, int, Outputs, Sequence[int] | None, int | None, int | None]
)


@dataclass(frozen=True)
class Span:
    """Rows row : row + n_rows of a batch belong to the sequence in slot `slot`, whose first `n_past` tokens are cached.

    `pages` are its cache pages, enough for n_total positions; None: the slot's own, for callers without a scheduler.
    `place` is where in the slot's ring the recurrent state after n_past tokens is; the state after n_total tokens goes
    one place further. None: the cache counts by itself, for callers without a scheduler.
    `writes` is the place of that state where it is another one: of a work item that a device cuts into several batches
    all but the first read the state where they write it, so that the whole item moves it by one place.
    """

    slot: int
    row: int
    n_rows: int
    n_past: int
    pages: Sequence[int] | None = None
    place: int | None = None
    writes: int | None = None

    @property
    def place_behind(self) -> int:
        """The place of the state after n_total tokens, where places are given."""
        assert self.place is not None
        return self.place + 1 if self.writes is None else self.writes

    @property
    def rows(self) -> slice:
        """Its rows of the batch."""
        return slice(self.row, self.row + self.n_rows)

    @property
    def n_total(self) -> int:
        """Tokens the slot holds after this step."""
        return self.n_past + self.n_rows


@dataclass(frozen=True, eq=False)
class Batch:
    """T new tokens of one or more sequences.

    Attributes:
        token_ids: (T,) int32.
        positions: (T,) int32, position of each token in its own sequence.
        spans: consecutive, covering all T rows, each slot at most once.
        output_rows: (R,) int32, ascending rows whose logits are wanted.
    """

    token_ids: Int32Array
    positions: Int32Array
    spans: tuple[Span, ...]
    output_rows: Int32Array

    @property
    def n_tokens(self) -> int:
        """T, the number of rows."""
        return len(self.token_ids)

    def single_rows(self, rows: Sequence[int]) -> Batch:
        """The batch of these rows, in this order; each is a span of its own whose logits are wanted."""
        spans = tuple(replace(self.spans[row], row=place) for place, row in enumerate(rows))
        assert all(span.n_rows == 1 for span in spans)
        return Batch(self.token_ids[rows], self.positions[rows], spans, np.arange(len(rows), dtype=np.int32))

    @classmethod
    def build(cls, parts: Iterable[Part]) -> Batch:
        """Lay out parts `(slot, token_ids, n_past, outputs[, pages[, place[, writes]]])` as one batch, in order."""
        parts = list(parts)
        if all(len(part[1]) == 1 for part in parts):
            return cls._of_single_tokens(parts)
        ids: list[Int32Array] = []
        positions: list[Int32Array] = []
        spans: list[Span] = []
        outputs: list[Int32Array] = []
        row = 0
        for slot, token_ids, n_past, wanted, *cache in parts:
            span = Span(slot, row, len(token_ids), n_past, *cache)
            assert span.n_rows > 0, "an empty span has no place in a batch"
            spans.append(span)
            ids.append(_int32(token_ids))
            positions.append(np.arange(n_past, span.n_total, dtype=np.int32))
            first = {Outputs.NONE: span.n_rows, Outputs.LAST: span.n_rows - 1, Outputs.ALL: 0}[wanted]
            outputs.append(np.arange(row + first, row + span.n_rows, dtype=np.int32))
            row += span.n_rows
        assert spans, "a batch has at least one span"
        assert len({span.slot for span in spans}) == len(spans), "a slot appears once per batch"
        if len(spans) == 1:
            return cls(ids[0], positions[0], (spans[0],), outputs[0])
        return cls(np.concatenate(ids), np.concatenate(positions), tuple(spans), np.concatenate(outputs))

    @classmethod
    def _of_single_tokens(cls, parts: Sequence[Part]) -> Batch:
        """The same of parts of one token each, as decode steps are: in a tenth of the calls of numpy."""
        assert parts, "a batch has at least one span"
        spans = tuple(Span(part[0], row, 1, part[2], *part[4:]) for row, part in enumerate(parts))
        assert len({span.slot for span in spans}) == len(spans), "a slot appears once per batch"
        columns = (
            [part[1][0] for part in parts],
            [part[2] for part in parts],
            [row for row, part in enumerate(parts) if part[3] is not Outputs.NONE],
        )
        ids, positions, outputs = (np.array(column, dtype=np.int32) for column in columns)
        return cls(ids, positions, spans, outputs)


def _int32(ids: Ids) -> Int32Array:
    """Token ids as int32; of a list through bytes, which takes two thirds of numpy's time."""
    if type(ids) is list:
        return np.frombuffer(bytearray(struct.pack(f"{len(ids)}i", *ids)), np.int32)
    return np.asarray(ids, dtype=np.int32)
