"""The compiled steps between products, as `FastOps` asks for them.

`Immediate` (immediate.py) computes when asked; the recorder (recorder.py) writes the same steps into a program that is
run later. Both use the same kernels, so both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.config import PAGE
from engine.model.batch import Batch, Span
from engine.model.config import Activation, AttentionTemperature, RopeStyle
from engine.model.rope import RopeTable
from engine.model.weights import LayerWeights, Linear, Norm, Weight

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

Finish = Callable[[Float32Array, Batch], None]
"""Changes rows of token_embd into the residual stream, in place."""


@dataclass(frozen=True)
class Angles:
    """How the tokens of a batch are rotated: cos and sin (T, n_pairs), and which elements form a pair."""

    cos: Float32Array
    sin: Float32Array
    style: RopeStyle


Pages = npt.NDArray[Any]
"""Keys or values of a layer, all pages of the cache: (N, K, PAGE, width)."""


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
        slots = np.array([span.slot for span in batch.spans])
        if len(slots) < batch.n_tokens:
            slots = np.repeat(slots, [span.n_rows for span in batch.spans])
        self.array[:, 0] = self.tables.ctypes.data + self.tables.strides[0] * slots
        self.array[:, 1] = batch.positions

    def part(self, span: Span) -> CacheRows:
        """The rows of a span."""
        return CacheRows(self.array[span.row : span.row + span.n_rows], self.tables, span.n_rows == 1)


@dataclass(frozen=True)
class Step:
    """One call of a step kernel (kernels/stepping.py).

    Attributes:
        kind: name of the kernel.
        type_name: its type.
        operands: what it reads.
        items: how many items there are to share among threads.
        floats: how many floats all items together touch: a measure of the work.
        unit: floats of the result that are written together; where these are whole blocks of activations, the kernel
            can write activations as well, at the address that is its last operand. 0 where it cannot.
    """

    kind: str
    type_name: str
    operands: tuple[int, ...]
    items: int
    floats: int
    unit: int = 0


class Steps(Protocol):
    """What FastOps is made of. Names say which buffer a result may live in; results last until the name is used again.

    Steps called one after another run in no order until join(): it separates writing from reading.
    """

    def join(self) -> None:
        """What follows may read what was written before."""

    def embed(self, name: str, table: Weight, batch: Batch, finish: Finish) -> Float32Array:
        """Rows of the table, (T, D), as `finish` changes them in place."""

    def angles(self, rope: RopeTable, positions: Int32Array) -> Angles:
        """Angles of a step's tokens."""

    def cache_rows(self, batch: Batch, tables: npt.NDArray[np.int64], chunk: int | None = None) -> CacheRows:
        """See CacheRows.of."""

    def factors(self, temperature: AttentionTemperature, positions: Int32Array) -> Float32Array:
        """(T,) factors on the queries."""

    def normalize(
        self, name: str, x: Float32Array, norm: Norm, residual: Float32Array | None = None, factor: float = 1.0
    ) -> Float32Array:
        """See reference.normalize; with a residual the result is residual + factor · norm(x)."""

    def linear(self, name: str, x: Float32Array, linear: Linear, residual: Float32Array | None = None) -> Float32Array:
        """scale · (x W') + bias + residual."""

    def rotate_store(
        self,
        x: Float32Array,
        rows: CacheRows,
        angles: Angles | None,
        cache: Pages,
        *,
        factors: Float32Array | None = None,
        store: bool = True,
    ) -> None:
        """Rotate x (T, heads, width) in place, scale it, and `store` it in the cache."""

    def attend(
        self,
        out: Float32Array,
        q: Float32Array,
        rows: CacheRows,
        cache: tuple[Pages, Pages],
        layer: LayerWeights,
    ) -> None:
        """Attention of queries (T, H, Hd), each over its own sequence, into out (T, H · Hv)."""

    def gate(self, x: Float32Array, y: Float32Array | None, activation: Activation) -> Float32Array:
        """activation(x) · y, written over x."""

    def empty(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """A buffer for the caller to fill through steps."""
