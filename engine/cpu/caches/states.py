"""Recurrent states on the CPU: rows of every layer's state, and copies of them. Independent of models and requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.cpu.memory import aligned_zeros
from engine.model.cache import LayerCache, StateCopies, StateRows
from engine.model.config import RecurrentConfig

Float32Array = npt.NDArray[np.float32]


class RecurrentCache:
    """States of one layer; implements engine.model.cache.LayerCache.

    `states` holds one array (rows, *shape) float32 for every shape of RecurrentConfig.state_shapes. Memory follows use:
    the system gives a row's memory when it is first written.
    """

    def __init__(self, mixer: RecurrentConfig) -> None:
        self._shapes = mixer.state_shapes
        self.bytes_per_token = 0
        self.bytes_per_state = mixer.state_bytes
        self.paged: tuple[Float32Array, ...] = ()
        self.states: tuple[Float32Array, ...] = ()

    def allocate(self, n_pages: int, n_states: int = 0) -> None:
        """See LayerCache.allocate."""
        self.states = tuple(aligned_zeros(n_states, *shape) for shape in self._shapes)


class States(StateCopies):
    """The states of all layers; implements engine.model.cache.StateStore.

    Args:
        layers: caches of all layers, allocated.
        rows: which row is which.
    """

    def __init__(self, layers: Sequence[LayerCache], rows: StateRows) -> None:
        self._arrays: list[Float32Array] = [array for layer in layers for array in layer.states]
        super().__init__(rows)

    def save(self, slot: int, place: int) -> list[Float32Array]:
        """See StateStore.save."""
        row = self._rows.place(slot, place)
        return [array[row].copy() for array in self._arrays]

    def load(self, saved: Sequence[Float32Array], slot: int, place: int) -> None:
        """See StateStore.load."""
        row = self._rows.place(slot, place)
        for array, data in zip(self._arrays, saved, strict=True):
            array[row] = data

    def _copy(self, source: int, target: int) -> None:
        for array in self._arrays:
            array[target] = array[source]
