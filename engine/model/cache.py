"""What the layers of a model keep of every sequence between steps: the protocols that each device implements.

Knows neither layouts nor number formats: those belong to the implementations (engine/cpu/kv_cache.py,
engine/cuda/attention/cache.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class LayerCache(Protocol):
    """The cache of one layer on one device.

    What each token leaves behind (keys and values, in any number format) lies in pages of PAGE positions. The arrays
    are exposed by what their first axis counts, so that moving pages is written once per device.
    """

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position of a page takes."""

    @property
    def paged(self) -> Sequence[Any]:
        """Arrays whose first axis counts pages; each memory once. Empty before allocate()."""

    def allocate(self, n_pages: int) -> None:
        """Make the arrays, zeroed."""


class ModelCache(Protocol):
    """The caches of all layers of a model on one device, moved together."""

    @property
    def layers(self) -> Sequence[LayerCache]:
        """One per layer, in order."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position takes over all layers."""

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target), all layers."""

    def save_pages(self, pages: Sequence[int]) -> Any:
        """What pages hold, outside the cache, bit for bit."""

    def load_pages(self, saved: Any, pages: Sequence[int]) -> None:
        """Put back what save_pages() gave, into as many pages."""
