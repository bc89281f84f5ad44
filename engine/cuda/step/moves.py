"""What moves the recurrent states of a step on: the states, and which of them its rows read and write.

Must not know of layers or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.cuda.load.buffers import Activations
from engine.cuda.recurrent.rows import Rows, span_table
from engine.cuda.recurrent.state_cache import StateCache
from engine.model.batch import Span
from engine.model.cache import StateRows


@dataclass(frozen=True, eq=False)
class Moves:
    """What moves the states of a step on.

    Attributes:
        states: the states, with the kernels. rows: which of them the rows of the step read and write.
        buffers: activations. product: see step.ops.Products.product.
    """

    states: StateCache
    rows: Rows
    buffers: Activations
    product: Callable[..., None]


def state_spans(spans: Iterable[Span], rows: StateRows) -> npt.NDArray[np.int32]:
    """Spans of a batch as the kernels read them, int32 (S, 5).

    Where a span names no place, the state after n tokens is at place n - 1, as decode steps leave it at offset 0. That
    is for callers without a scheduler: only places that a step does not overwrite make it repeatable.
    """
    found = []
    for span in spans:
        read, write = (span.n_past - 1, span.n_total - 1) if span.place is None else (span.place, span.place_behind)
        found.append((span.row, span.n_rows, span.n_past, rows.place(span.slot, read), rows.place(span.slot, write)))
    return span_table(found)
