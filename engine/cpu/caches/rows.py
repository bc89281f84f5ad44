"""Where the rows of a batch are in the cache, as kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.config import PAGE
from engine.cpu.memory import array_address
from engine.model.batch import Batch, Span


@dataclass(frozen=True)
class CacheRows:
    """Where the rows of a batch are in the cache.

    Attributes:
        array: (T, 2) int64: the address of the row's table of pages, and the row's position in them.
        tables: what the addresses point into: int64, pages of each slot's sequence.
        alone: each row is a sequence of its own; otherwise neighbouring rows mostly belong to the same one.
    """

    array: npt.NDArray[np.int64]
    tables: npt.NDArray[np.int64]
    alone: bool

    @classmethod
    def of(cls, batch: Batch, tables: npt.NDArray[np.int64], chunk: int | None = None) -> CacheRows:
        """The rows of a batch; with a chunk, as if each row's sequence began with the chunk of positions it is in."""
        rows = cls(np.empty((batch.n_tokens, 2), dtype=np.int64), tables, len(batch.spans) == batch.n_tokens)
        rows.fill(batch)
        if chunk is not None:
            start = rows.array[:, 1] // chunk * chunk
            rows.array[:, 0] += start // PAGE * tables.itemsize
            rows.array[:, 1] -= start
        return rows

    def fill(self, batch: Batch) -> None:
        """Write the rows of another batch of as many tokens."""
        if len(batch.spans) == len(self.array) == 1:  # the decode step of one sequence, in which numpy takes longest
            (span,) = batch.spans
            self.array[0] = array_address(self.tables) + self.tables.strides[0] * span.slot, span.n_past
            return
        slots = np.array([span.slot for span in batch.spans])
        if len(slots) < batch.n_tokens:
            slots = np.repeat(slots, [span.n_rows for span in batch.spans])
        self.array[:, 0] = array_address(self.tables) + self.tables.strides[0] * slots
        self.array[:, 1] = batch.positions

    def part(self, span: Span) -> CacheRows:
        """The rows of a span."""
        return CacheRows(self.array[span.row : span.row + span.n_rows], self.tables, span.n_rows == 1)
