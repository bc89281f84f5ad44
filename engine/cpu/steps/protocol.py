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

from engine.cpu.caches.rows import CacheRows
from engine.model.batch import Batch
from engine.model.config import Activation, AttentionTemperature, RopeStyle
from engine.model.rope import RopeTable
from engine.model.weights import LayerWeights, Linear, Norm, Weight

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

FindRows = Callable[[Batch], npt.NDArray[np.int64]]
"""Numbers of rows, by a batch."""

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


@dataclass(frozen=True, eq=False)
class StateRow:
    """One sequence's state in one array of a layer's cache.

    Attributes:
        array: (rows, ...) float32, contiguous.
        zeros: (...) what a sequence begins with.
        rows: (2,) int64, the row of the state before the step's tokens, -1 for zeros, and of the one behind them.
    """

    array: Float32Array
    zeros: Float32Array
    rows: npt.NDArray[np.int64]

    @property
    def operands(self) -> tuple[int, int, int]:
        """Addresses, as kernels take them."""
        first: tuple[int, int, int] = (self.array.ctypes.data, self.zeros.ctypes.data, self.rows.ctypes.data)
        return first


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
            can write activations as well, at the address and in the form that are its last operands. 0 where it cannot.
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

    def gate(self, x: Float32Array, y: Float32Array | None, activation: Activation | None) -> Float32Array:
        """activation(x) · y, written over x; None is the sigmoid."""

    def take_columns(self, name: str, x: Float32Array, first: int, width: int) -> Float32Array:
        """Columns of every head of x (T, H, C), which has no gaps, as an array (T, H · width) of their own."""

    def state_rows(self, batch: Batch, find: FindRows) -> npt.NDArray[np.int64]:
        """find(batch), (S, 2): rows of the states of each span that are read and written (KVCache.state_rows)."""

    def recur(self, step: Step, out: Float32Array, *alive: object) -> None:
        """A step of a recurrent mixer (recurrent_steps.py), which writes into `out`, perhaps into some rows of it.

        alive: what its addresses point into, beside `out`.
        """

    def empty(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """A buffer for the caller to fill through steps."""
