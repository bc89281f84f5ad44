"""Keys and values of past tokens: pages of PAGE positions. Knows layouts, not models or requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import PAGE
from engine.cpu.memory import aligned_zeros
from engine.errors import ContextFullError, DeviceError
from engine.model.batch import Span
from engine.model.config import AttentionConfig

KV_TYPES: dict[str, type[np.float16] | type[np.float32]] = {"f16": np.float16, "f32": np.float32}

CacheArray = npt.NDArray[np.float16 | np.float32]
PageTable = npt.NDArray[np.int64]


def page_count(n_positions: int) -> int:
    """Pages that so many positions need."""
    return -(-n_positions // PAGE)


class KVCache:
    """Pages of keys and values, and the table that says which pages each of `n_slots` sequences reads.

    Per layer there are keys (N, K, PAGE, Hd), in memory (N, K, Hd, PAGE), and values (N, K, PAGE, Hv) of N pages.
    Memory follows use: the system gives a page's memory when it is first written. Where a row is written depends on its
    span alone, so that an interrupted step can be run again.

    Args:
        layers: attention of each layer.
        context_length: positions a sequence may have.
        n_slots: sequences side by side.
        n_pages: N; None gives every slot pages for a whole context.
        kv_type: "f16" or "f32".
        values_apart: keep values in an array of their own also where they are parts of the keys; the attention kernel
            reads keys and values in an order of its own each.
    """

    def __init__(
        self,
        layers: Sequence[AttentionConfig],
        *,
        context_length: int,
        n_slots: int = 1,
        n_pages: int | None = None,
        kv_type: str = "f16",
        values_apart: bool = False,
    ) -> None:
        self.context_length = context_length
        self.n_slots = n_slots
        self.n_pages = n_slots * page_count(context_length) if n_pages is None else n_pages
        self._layers = tuple(layers)
        self._dtype = KV_TYPES[kv_type]
        self._values_apart = values_apart
        self.tables: PageTable = self._zeros(n_slots, page_count(context_length), dtype=np.int64)
        """Pages of each slot's sequence; the addresses of its rows never change."""
        self._arrays: list[tuple[CacheArray, CacheArray]] = [self._of_layer(layer) for layer in layers]

    def _of_layer(self, layer: AttentionConfig) -> tuple[CacheArray, CacheArray]:
        """Keys and values; the values are views of the keys where they are parts of them."""
        # Neighbouring positions of a key's element lie side by side: attention makes them the lanes of a vector.
        keys = self._pages(layer.n_kv_heads, layer.key_width, PAGE).transpose(0, 1, 3, 2)
        if self._in_keys(layer):
            return keys, keys[..., : layer.value_width]
        return keys, self._pages(layer.n_kv_heads, PAGE, layer.value_width)

    def _in_keys(self, layer: AttentionConfig) -> bool:
        return layer.values_in_keys and not self._values_apart

    def _pages(self, *shape: int) -> CacheArray:
        return self._zeros(self.n_pages, *shape, dtype=self._dtype)

    def _zeros(self, *shape: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        try:
            return aligned_zeros(*shape, dtype=dtype)
        except MemoryError:
            needed = self.bytes_per_token * self.n_pages * PAGE / 2**30
            raise DeviceError(
                f"the system gives no memory for a key-value cache of {self.n_pages * PAGE} tokens, {needed:.1f} GiB: "
                "ask for a smaller context_length or cache_tokens, or for fewer sequences"
            ) from None

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes over all layers."""
        widths = sum(
            layer.n_kv_heads * (layer.key_width + (0 if self._in_keys(layer) else layer.value_width))
            for layer in self._layers
        )
        return widths * np.dtype(self._dtype).itemsize

    def arrays(self, layer: int) -> tuple[CacheArray, CacheArray]:
        """All pages of keys (N, K, PAGE, Hd) and values (N, K, PAGE, Hv) of a layer."""
        return self._arrays[layer]

    def reserve(self, spans: Sequence[Span]) -> None:
        """Look up the pages of a step's sequences.

        Raises:
            ContextFullError: a sequence would become longer than the context; nothing was changed.
        """
        for span in spans:
            assert 0 <= span.slot < self.n_slots, f"slot {span.slot} of {self.n_slots}"
            if span.n_total > self.context_length:
                raise ContextFullError(span.n_total, self.context_length)
        for span in spans:
            needed = page_count(span.n_total)
            if span.pages is None:  # a caller without a scheduler: every slot has pages of its own
                first = span.slot * self.tables.shape[1]
                assert first + needed <= self.n_pages, "the cache has no pages of this slot's own"
                self.tables[span.slot, :needed] = np.arange(first, first + needed)
            else:
                assert len(span.pages) >= needed, f"{len(span.pages)} pages for {span.n_total} positions"
                self.tables[span.slot, :needed] = span.pages[:needed]

    def append(self, layer: int, span: Span, k: npt.NDArray[np.float32], v: npt.NDArray[np.float32]) -> None:
        """Store the new rows of one span: k (n_rows, K, Hd), v (n_rows, K, Hv)."""
        positions = np.arange(span.n_past, span.n_total)
        pages, places = self.tables[span.slot, positions // PAGE], positions % PAGE
        keys, values = self._arrays[layer]
        keys[pages, :, places] = k
        if not self._in_keys(self._layers[layer]):
            values[pages, :, places] = v

    def view(self, layer: int, span: Span) -> tuple[CacheArray, CacheArray]:
        """Keys (K, n_total, Hd) and values (K, n_total, Hv) of one sequence, gathered into new arrays."""
        pages = self.tables[span.slot, : page_count(span.n_total)]
        keys, values = (
            array[pages].transpose(1, 0, 2, 3).reshape(array.shape[1], -1, array.shape[3])[:, : span.n_total]
            for array in self._arrays[layer]
        )
        return keys, values

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target), all layers."""
        for source, target in pairs:
            for arrays in self._arrays:
                for array in arrays:
                    array[target] = array[source]

    def save_pages(self, pages: Sequence[int]) -> list[CacheArray]:
        """What pages hold, in arrays of their own."""
        return [array[list(pages)] for arrays in self._arrays for array in arrays]

    def load_pages(self, saved: Sequence[CacheArray], pages: Sequence[int]) -> None:
        """Put back what save_pages() gave, into as many pages."""
        for array, data in zip((array for arrays in self._arrays for array in arrays), saved, strict=True):
            array[list(pages)] = data

    def close(self) -> None:
        """Give the memory back."""
        self._arrays = []
