"""Recurrent states on the device: rows of every layer's state, the ring of each slot, and copies of states.

A slot's ring is explained in docs/decisions/repeatable-step.md. All copies are launches of one stream, in order with
the steps. Must not know of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.row_store import RowStore, SavedRows
from engine.cuda.driver.staging import Staging
from engine.cuda.recurrent.convolution import Convolution, ConvShape
from engine.cuda.recurrent.delta import Delta, DeltaShape
from engine.cuda.recurrent.lightning import Lightning, LightningShape
from engine.cuda.recurrent.mamba import Mamba
from engine.cuda.recurrent.mamba_2 import Mamba2, Mamba2Shape
from engine.cuda.recurrent.mamba_plan import MambaShape
from engine.cuda.recurrent.ngrams.ngrams import Ngrams, NgramShape
from engine.cuda.recurrent.plan import StateShape
from engine.cuda.recurrent.rwkv.rwkv_6 import Rwkv6, Rwkv6Shape
from engine.cuda.recurrent.rwkv.rwkv_7 import Rwkv7, Rwkv7Shape
from engine.model.cache import StateCopies, StateRows

Kernels = Convolution | Mamba | Mamba2 | Delta | Lightning | Rwkv6 | Rwkv7 | Ngrams
"""The kernels of a recurrent layer or a table of n-grams; one class per class of StateShape."""


class RecurrentCache:
    """States of one layer; implements engine.model.cache.LayerCache.

    `states` holds one float32 array (rows, *shape) for every shape of StateShape.state_shapes.
    """

    def __init__(self, shape: StateShape) -> None:
        self._shape = shape
        self.bytes_per_token = 0
        self.paged: tuple[DeviceArray, ...] = ()
        self.states: tuple[DeviceArray, ...] = ()

    @property
    def bytes_per_state(self) -> int:
        """See LayerCache.bytes_per_state."""
        return self._shape.state_bytes

    def allocate(self, n_pages: int, n_states: int = 0) -> None:
        """See LayerCache.allocate."""
        import cupy

        self.states = tuple(cupy.zeros((n_states, *shape), cupy.float32) for shape in self._shape.state_shapes)


def make_kernels(shape: StateShape) -> Kernels:
    """The kernels of a shape on the current device."""
    if isinstance(shape, ConvShape):
        return Convolution(shape)
    if isinstance(shape, MambaShape):
        return Mamba(shape)
    if isinstance(shape, Mamba2Shape):
        return Mamba2(shape)
    if isinstance(shape, LightningShape):
        return Lightning(shape)
    if isinstance(shape, NgramShape):
        return Ngrams(shape)
    if isinstance(shape, Rwkv6Shape):
        return Rwkv6(shape)
    if isinstance(shape, Rwkv7Shape):
        return Rwkv7(shape)
    assert isinstance(shape, DeltaShape)
    return Delta(shape)


class StateCache:
    """The states of all layers, and the kernels that read and write them.

    Args:
        shapes: of every layer, None for one without a state, and of tables of n-grams behind them.
        rows: which row is which; at least two places.

    Attributes:
        layers: the cache of each layer, or None.
        rows: as given.
        kernels: of each shape.
        offsets: int32 (slots,): a token decoded at a position leaves its state at place (position + offset) mod R.
    """

    def __init__(self, shapes: Sequence[StateShape | None], rows: StateRows) -> None:
        import cupy

        self.rows = rows
        self.layers = [None if shape is None else RecurrentCache(shape) for shape in shapes]
        self.kernels = {shape: make_kernels(shape) for shape in dict.fromkeys(shapes) if shape is not None}
        caches = [layer for layer in self.layers if layer is not None]
        for layer in caches:
            layer.allocate(0, rows.total)
        self.offsets = cupy.zeros(rows.n_slots, cupy.int32)
        self._new_offsets: dict[int, int] = {}
        self._store = RowStore([array for layer in caches for array in layer.states])

    def arrays(self, layer: int) -> tuple[DeviceArray, ...]:
        """The states of a layer, in the order of its shape."""
        cache = self.layers[layer]
        assert cache is not None, "a layer without a state"
        return cache.states

    def seat(self, slot: int, place: int, position: int) -> None:
        """The next token that the slot decodes is at that position, and the state before it at that place."""
        self._new_offsets[slot] = place + 1 - position

    def flush(self, staging: Staging) -> None:
        """Puts changed offsets on their way."""
        for slot, offset in self._new_offsets.items():
            staging.put(self.offsets, slot, np.array([offset], np.int32))
        self._new_offsets.clear()

    def forget(self) -> None:
        """No offset is on its way: every row that runs again sends its own."""
        self._new_offsets.clear()

    def copy(self, source: int, target: int, staging: Staging) -> None:
        """Copies a row, all layers."""
        if source != target:
            self._store.copy([(source, target)], staging)

    def save(self, row: int, staging: Staging) -> SavedRows:
        """A row as host memory, in stream order: it may be overwritten by whatever is launched next."""
        return self._store.save([row], staging)

    def load(self, saved: SavedRows, row: int, staging: Staging) -> None:
        """The opposite, into any row."""
        self._store.load(saved, [row], staging)


class DeviceStates(StateCopies):
    """What the scheduler does with states; implements engine.model.cache.StateStore.

    Args:
        cache: the states.
        staging: the way from the host.
        running: entered around every call that launches something.
    """

    def __init__(
        self, cache: StateCache, staging: Staging, running: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._cache, self._staging, self._running = cache, staging, running
        super().__init__(cache.rows)

    def save(self, slot: int, place: int) -> SavedRows:
        """See StateStore.save; the copy is under way when this returns."""
        with self._running():
            return self._cache.save(self._rows.place(slot, place), self._staging)

    def load(self, saved: SavedRows, slot: int, place: int) -> None:
        """See StateStore.load."""
        with self._running():
            self._cache.load(saved, self._rows.place(slot, place), self._staging)

    def _copy(self, source: int, target: int) -> None:
        with self._running():
            self._cache.copy(source, target, self._staging)
