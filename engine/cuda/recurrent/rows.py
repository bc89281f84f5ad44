"""Which rows of states the rows of a step read and write: what a decode step computes on the device, a prompt lists.

Letters: B rows of a decode step, S spans of a prompt batch, R places of a slot's ring. Must not know of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.config import STATE_BORDER
from engine.cuda.driver.arrays import DeviceArray

TILE = 8
"""Rows of a block of the prompts' convolution."""

CHUNK = STATE_BORDER
"""Tokens of prompts that linear recurrences take together; chunks begin at multiples of it (chunk_walk.cuh)."""


@dataclass(frozen=True, eq=False)
class DecodeRows:
    """Row b is slot b. A slot's ring is the rows slot * R to slot * R + R - 1 of every array of states.

    A token reads the place in front of its own and writes its own; at position 0 it starts from zero. So a step that is
    run again gives the same bits.

    Attributes:
        positions: int32 (B,): position of each slot's token, -1 for a padded row (nothing read, nothing written).
        offsets: int32 (slots,): the state behind the token at a position is kept at place (position + offset) mod R.
        places: R, at least 2: a state is never written where it is read.
    """

    positions: DeviceArray
    offsets: DeviceArray
    places: int

    def __post_init__(self) -> None:
        assert self.places >= 2 and self.positions.size <= self.offsets.size

    @property
    def count(self) -> int:
        """B."""
        return int(self.positions.size)

    def fit(self, states: DeviceArray) -> bool:
        """Whether an array of states has the rings of all slots."""
        return self.offsets.size * self.places <= len(states)


@dataclass(frozen=True, eq=False)
class PromptRows:
    """Pieces of prompts.

    Attributes:
        spans: int32 (S, 5) on the device, from span_table. Without spans nothing is launched.
        tiles: int32 (n_tiles, 2) on the device, from conv_tiles.
        chunks: int32 (n_chunks, 2) on the device, from chunks_of.
    """

    spans: DeviceArray
    tiles: DeviceArray
    chunks: DeviceArray

    @classmethod
    def of(cls, table: npt.NDArray[np.int32], place: Callable[[npt.NDArray[np.int32]], DeviceArray]) -> PromptRows:
        """The rows of a span_table; place: the way to the device."""
        return cls(place(table), place(conv_tiles(table)), place(chunks_of(table)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """What decides the grids of its kernels."""
        return len(self.spans), len(self.tiles), len(self.chunks)


Rows = DecodeRows | PromptRows
"""The rows of one step."""


def span_table(spans: Iterable[tuple[int, int, int, int, int]]) -> npt.NDArray[np.int32]:
    """Spans of a prompt batch as the kernels read them: int32 (S, 5).

    Args:
        spans: (row, n_rows, n_past, read, write) each: n_rows >= 1 consecutive tokens of one sequence from position
            n_past on, starting at batch row `row`; the rows of states that are read and written, which may be the same.
            Without a past nothing is read. No other span of the batch may name the row that one writes.
    """
    table = np.array(list(spans), np.int32).reshape(-1, 5)
    assert (table[:, 1] >= 1).all(), "a span without rows"
    assert len(np.unique(table[:, 4])) == len(table), "two spans write the same state"
    return table


def conv_tiles(table: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Cuts the spans of span_table into tiles of the convolution: int32 (n_tiles, 2), span and first row in it."""
    tiles = [(span, first) for span, row in enumerate(table) for first in range(0, int(row[1]), TILE)]
    return np.array(tiles, np.int32).reshape(-1, 2)


def chunks_of(table: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Cuts the spans of span_table at positions that are multiples of CHUNK: int32 (n, 2), span and first row in it."""
    chunks = []
    for span, (_, n_rows, n_past, *_) in enumerate(table.tolist()):
        chunks += [(span, max(0, first)) for first in range(-(n_past % CHUNK), n_rows, CHUNK)]
    return np.array(chunks, np.int32).reshape(-1, 2)
