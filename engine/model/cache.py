"""What the layers of a model keep of every sequence between steps: the protocols that each device implements.

Layouts and number formats are not decided here: those belong to the implementations (engine/cpu/caches/;
engine/cuda/attention/cache.py, recurrent/state_cache.py). A new kind of layer memory (quantized pages, another
recurrent state) is one more implementation of LayerCache per device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class StateRows:
    """Where recurrent states are: the first axis of every array of states.

    First the rings of all slots, `places` rows each, then the entries of the checkpoint pool.

    Attributes:
        n_slots: slots.
        places: R, places of a slot's ring; see docs/decisions/repeatable-step.md for the least that a device needs.
        n_checkpoints: entries of the pool.
    """

    n_slots: int
    places: int
    n_checkpoints: int

    @property
    def total(self) -> int:
        """All rows."""
        return self.n_slots * self.places + self.n_checkpoints

    def place(self, slot: int, place: int) -> int:
        """The row of a place of a slot; places are counted modulo R."""
        assert 0 <= slot < self.n_slots, f"slot {slot} of {self.n_slots}"
        return slot * self.places + place % self.places

    def entry(self, entry: int) -> int:
        """The row of a checkpoint."""
        assert 0 <= entry < self.n_checkpoints, f"entry {entry} of {self.n_checkpoints}"
        return self.n_slots * self.places + entry


class LayerCache(Protocol):
    """The cache of one layer on one device.

    What is kept of each token (keys and values, in any number format) is in pages of PAGE positions. What is kept of a
    whole sequence (a recurrent state) is in rows numbered by StateRows. Both kinds of arrays are exposed by what their
    first axis counts, so that copying, saving and loading are written once per device.
    """

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position of a page takes; 0 where the layer has no pages."""

    @property
    def bytes_per_state(self) -> int:
        """Bytes of one state; 0 where the layer has none."""

    @property
    def paged(self) -> Sequence[Any]:
        """Arrays whose first axis counts pages; each memory once. Empty before allocate()."""

    @property
    def states(self) -> Sequence[Any]:
        """Arrays whose first axis counts states, float32. Empty before allocate()."""

    def allocate(self, n_pages: int, n_states: int = 0) -> None:
        """Make the arrays, zeroed."""


class StateStore(Protocol):
    """The recurrent states of all layers of a model on one device, moved together.

    Copies happen in order with the steps: a step launched before a copy may still write other places.
    """

    @property
    def n_checkpoints(self) -> int:
        """Entries of the checkpoint pool."""

    def checkpoint(self, slot: int, place: int, entry: int) -> None:
        """Copy the state at a place of a slot to an entry of the pool."""

    def restore(self, entry: int, slot: int, place: int) -> None:
        """Copy an entry of the pool to a place of a slot."""

    def move(self, slot: int, target: int, place: int) -> None:
        """Copy the state at a place of a slot to the same place of another slot."""

    def save(self, slot: int, place: int) -> Any:
        """The state at a place of a slot, outside the cache, bit for bit."""

    def load(self, saved: Any, slot: int, place: int) -> None:
        """Put back what save() gave."""


class StateCopies(ABC):
    """The half of a StateStore that copies rows: which ones is the same on every device.

    Args:
        rows: which row is which.
    """

    def __init__(self, rows: StateRows) -> None:
        self._rows = rows

    @abstractmethod
    def _copy(self, source: int, target: int) -> None:
        """Copy one row of every layer's states to another row."""

    @property
    def n_checkpoints(self) -> int:
        """See StateStore.n_checkpoints."""
        return self._rows.n_checkpoints

    def checkpoint(self, slot: int, place: int, entry: int) -> None:
        """See StateStore.checkpoint."""
        self._copy(self._rows.place(slot, place), self._rows.entry(entry))

    def restore(self, entry: int, slot: int, place: int) -> None:
        """See StateStore.restore."""
        self._copy(self._rows.entry(entry), self._rows.place(slot, place))

    def move(self, slot: int, target: int, place: int) -> None:
        """See StateStore.move."""
        self._copy(self._rows.place(slot, place), self._rows.place(target, place))


class ModelCache(Protocol):
    """The caches of all layers of a model on one device, moved together."""

    @property
    def layers(self) -> Sequence[LayerCache]:
        """One per layer, in order, then those of tables of n-grams."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position takes over all layers."""

    @property
    def bytes_per_state(self) -> int:
        """Bytes that one state takes over all layers."""

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target), all layers."""

    def save_pages(self, pages: Sequence[int]) -> Any:
        """What pages hold, outside the cache, bit for bit."""

    def load_pages(self, saved: Any, pages: Sequence[int]) -> None:
        """Put back what save_pages() gave, into as many pages."""
