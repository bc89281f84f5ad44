"""The cache of a layer with attention and a recurrent mixer, or with neither."""

from __future__ import annotations

from typing import Any

from engine.cpu.caches.attention import AttentionCache
from engine.cpu.caches.states import RecurrentCache


class JoinedCache:
    """Pages of the one and states of the other; implements engine.model.cache.LayerCache.

    Args:
        attention: cache of the attention, if the layer has any.
        recurrent: cache of the recurrent mixer, if the layer has one.
    """

    def __init__(self, attention: AttentionCache | None, recurrent: RecurrentCache | None) -> None:
        self.attention = attention
        self.recurrent = recurrent
        self.bytes_per_token = 0 if attention is None else attention.bytes_per_token
        self.bytes_per_state = 0 if recurrent is None else recurrent.bytes_per_state

    @property
    def paged(self) -> tuple[Any, ...]:
        """See LayerCache.paged."""
        return () if self.attention is None else self.attention.paged

    @property
    def states(self) -> tuple[Any, ...]:
        """See LayerCache.states."""
        return () if self.recurrent is None else self.recurrent.states

    def allocate(self, n_pages: int, n_states: int = 0) -> None:
        """See LayerCache.allocate."""
        for cache in (self.attention, self.recurrent):
            if cache is not None:
                cache.allocate(n_pages, n_states)
