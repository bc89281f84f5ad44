"""The cache on the CPU: the caches of all layers together. Independent of models and requests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from engine.config import PAGE, KvType, page_count
from engine.cpu.caches.attention import AttentionCache, CacheArray, Pages, PageTable
from engine.cpu.caches.joined import JoinedCache
from engine.cpu.caches.states import RecurrentCache, States
from engine.cpu.memory import aligned_zeros
from engine.errors import ContextFullError, DeviceError
from engine.model.batch import Batch, Span
from engine.model.cache import LayerCache, StateRows
from engine.model.config import AttentionConfig, CombinedConfig, MixerConfig, RecurrentConfig

STATE_PLACES = 2
"""Places of a slot's ring: one that a step reads and one that it writes, as nothing runs ahead on the CPU."""

Cache = AttentionCache | RecurrentCache | JoinedCache


class KVCache:
    """The caches of all layers and the table that says which pages each of `n_slots` sequences reads.

    Implements engine.model.cache.ModelCache. Where a row or a state is written depends on its span alone, so that an
    interrupted step can be run again.

    Args:
        mixers: what each layer mixes tokens with.
        context_length: positions a sequence may have.
        n_slots: sequences side by side.
        n_pages: pages in all; None gives every slot pages for a whole context.
        kv_type: number format of keys and values.
        values_apart: see AttentionCache.
        n_checkpoints: copies of recurrent states kept for later prompts.
        shared: layers whose attention has the same shape use the same pages, one layer after the other: for batches of
            whole texts, of which nothing is read again.

    Attributes:
        tables: int64 (n_slots, pages of a context), pages of each slot's sequence; the addresses of its rows never
            change.
        layers: the cache of each layer.
        states: the recurrent states; None where no layer has one.

    Raises:
        DeviceError: the system gives no memory for so many pages.
    """

    def __init__(
        self,
        mixers: Sequence[MixerConfig | None],
        *,
        context_length: int,
        n_slots: int = 1,
        n_pages: int | None = None,
        kv_type: str = KvType.F16,
        values_apart: bool = False,
        n_checkpoints: int = 0,
        shared: bool = False,
    ) -> None:
        self.context_length = context_length
        self.n_slots = n_slots
        self.n_pages = n_slots * page_count(context_length) if n_pages is None else n_pages
        format = KvType.parse(kv_type)
        self._caches = [_layer_cache(mixer, format, values_apart=values_apart) for mixer in mixers]
        self._owners = [_owner(mixer, index) for index, mixer in enumerate(mixers)]
        if shared and self._owners == list(range(len(mixers))):  # else later layers read what earlier ones have kept
            self._caches = _joined(self._caches, mixers)
        self.layers: Sequence[LayerCache] = self._caches
        self._rows = StateRows(n_slots, STATE_PLACES, n_checkpoints)
        try:
            self.tables: PageTable = aligned_zeros(n_slots, page_count(context_length), dtype=np.int64)
            """Pages of each slot's sequence; the addresses of its rows never change."""
            for layer in dict.fromkeys(self.layers):
                layer.allocate(self.n_pages, self._rows.total)
        except MemoryError:
            # In whole numbers: a float ends at 1e308, and callers may ask for more.
            tenths = (self.page_bytes + self.state_bytes) * 10 >> 30
            raise DeviceError(
                f"the system gives no memory for a cache of {self.n_pages * PAGE} tokens, {tenths // 10}.{tenths % 10} "
                "GiB: ask for a smaller context_length or cache_tokens, or for fewer sequences"
            ) from None
        self.states = States(self.layers, self._rows) if self.bytes_per_state else None
        self._places: list[tuple[int | None, int]] = [(None, 0)] * n_slots  # that this step reads and writes
        self._counted: list[dict[int, int]] = [{} for _ in range(n_slots)]  # place by tokens, for Span.place None

    @property
    def bytes_per_token(self) -> int:
        """See ModelCache.bytes_per_token."""
        return sum(layer.bytes_per_token for layer in dict.fromkeys(self.layers))

    @property
    def bytes_per_state(self) -> int:
        """See ModelCache.bytes_per_state."""
        return sum(layer.bytes_per_state for layer in self.layers)

    @property
    def page_bytes(self) -> int:
        """Bytes of all pages."""
        return self.bytes_per_token * self.n_pages * PAGE

    @property
    def state_bytes(self) -> int:
        """Bytes of all states, those of the checkpoints included."""
        return self.bytes_per_state * self._rows.total

    def arrays(self, layer: int) -> tuple[Pages, Pages]:
        """All pages of keys (N, K, PAGE, Hd) and values (N, K, PAGE, Hv) of a layer, of 8 bits their quants."""
        cache = self._attention(layer)
        return cache.keys, cache.values

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
            if self.states is not None:
                self._places[span.slot] = self._places_of(span)

    def _places_of(self, span: Span) -> tuple[int | None, int]:
        """The places of the slot's ring that a span reads (None at the beginning of a sequence) and writes."""
        if span.place is not None:
            return (span.place if span.n_past else None), span.place_behind
        counted = self._counted[span.slot]
        if span.n_past == 0:
            counted.clear()
            counted[0] = 0
        assert span.n_past in counted, f"no state after {span.n_past} tokens is left in slot {span.slot}"
        read = counted[span.n_past]
        # States that this step overwrites are gone, and so are those of an interrupted step that this one repeats.
        kept = {tokens: place for tokens, place in counted.items() if read + 1 - STATE_PLACES < place <= read}
        self._counted[span.slot] = kept | {span.n_total: read + 1}
        return (read if span.n_past else None), read + 1

    def state_rows(self, batch: Batch) -> npt.NDArray[np.int64]:
        """For each span the rows of the states that state() gives, -1 for zeros, and store_state() writes: (S, 2)."""
        rows, places = self._rows, ((span.slot, *self._places[span.slot]) for span in batch.spans)
        found = [
            (-1 if read is None else rows.place(slot, read), rows.place(slot, write)) for slot, read, write in places
        ]
        return np.array(found, np.int64)

    def state_arrays(self, layer: int) -> tuple[npt.NDArray[np.float32], ...]:
        """A layer's arrays of states, (rows, ...) each; see RecurrentConfig.state_shapes."""
        return self._recurrent(layer).states

    def state(self, layer: int, span: Span) -> tuple[npt.NDArray[np.float32], ...]:
        """A layer's state of a sequence before its span's first token, read-only; see RecurrentConfig.state_shapes."""
        read, _ = self._places[span.slot]
        arrays = self._recurrent(layer).states
        if read is None:
            return tuple(np.zeros(array.shape[1:], dtype=np.float32) for array in arrays)
        row = self._rows.place(span.slot, read)
        return tuple(array[row] for array in arrays)

    def store_state(self, layer: int, span: Span, values: Sequence[npt.NDArray[np.float32] | None]) -> None:
        """Write the state after a span's last token, one place after the one that state() reads.

        None among the values leaves an array as it is.
        """
        _, write = self._places[span.slot]
        row = self._rows.place(span.slot, write)
        for array, value in zip(self._recurrent(layer).states, values, strict=True):
            if value is not None:
                array[row] = value

    def append(self, layer: int, span: Span, k: npt.NDArray[np.float32], v: npt.NDArray[np.float32]) -> None:
        """Store the new rows of one span: k (n_rows, K, Hd), v (n_rows, K, Hv)."""
        self._attention(layer).append(self.tables[span.slot], np.arange(span.n_past, span.n_total), k, v)

    def view(self, layer: int, span: Span) -> tuple[CacheArray, CacheArray]:
        """Keys (K, n_total, Hd) and values (K, n_total, Hv) of one sequence, gathered into new arrays."""
        pages = self.tables[span.slot, : page_count(span.n_total)]
        return self._attention(layer).view(pages, span.n_total)

    def append_index(self, layer: int, span: Span, k: npt.NDArray[np.float32]) -> None:
        """Store the keys k (n_rows, Di) of a layer's indexer for the new rows of one span."""
        self._attention(layer).append_index(self.tables[span.slot], np.arange(span.n_past, span.n_total), k)

    def view_index(self, layer: int, span: Span, first: int = 0) -> CacheArray:
        """The keys (n_total - first, Di) of a layer's indexer from a position on, gathered into a new array."""
        pages = self.tables[span.slot, : page_count(span.n_total)]
        return self._attention(layer).view_index(pages, span.n_total, first)

    def store_blocks(self, layer: int, span: Span, first: int, keys: npt.NDArray[np.float32]) -> None:
        """Store the keys (B, W) of a sequence's blocks from number `first` on."""
        self._attention(layer).store_blocks(self.tables[span.slot], first, keys)

    def view_blocks(self, layer: int, span: Span, n_blocks: int) -> CacheArray:
        """The keys (B, W) of a sequence's first blocks, gathered into a new array."""
        return self._attention(layer).view_blocks(self.tables[span.slot], n_blocks)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See ModelCache.copy_pages."""
        for source, target in pairs:
            for array in self._paged():
                array[target] = array[source]

    def save_pages(self, pages: Sequence[int]) -> list[CacheArray]:
        """See ModelCache.save_pages."""
        return [array[list(pages)] for array in self._paged()]

    def load_pages(self, saved: Sequence[CacheArray], pages: Sequence[int]) -> None:
        """See ModelCache.load_pages."""
        for array, data in zip(self._paged(), saved, strict=True):
            array[list(pages)] = data

    def close(self) -> None:
        """Free the memory."""
        self.layers = self._caches = []
        self.states = None

    def _attention(self, layer: int) -> AttentionCache:
        cache = self._caches[self._owners[layer]]
        if isinstance(cache, JoinedCache):
            assert cache.attention is not None
            return cache.attention
        assert isinstance(cache, AttentionCache)
        return cache

    def _recurrent(self, layer: int) -> RecurrentCache:
        cache = self._caches[layer]
        if isinstance(cache, JoinedCache):
            assert cache.recurrent is not None
            return cache.recurrent
        assert isinstance(cache, RecurrentCache)
        return cache

    def _paged(self) -> chain[CacheArray]:
        return chain.from_iterable(layer.paged for layer in self.layers)


def _joined(caches: Sequence[Cache], mixers: Sequence[MixerConfig | None]) -> list[Cache]:
    """The caches with one for all layers whose attention has the same shape."""
    first: dict[tuple[object, ...], Cache] = {}
    joined: list[Cache] = []
    for cache, mixer in zip(caches, mixers, strict=True):
        if isinstance(mixer, AttentionConfig):
            shape = (mixer.n_kv_heads, mixer.key_width, mixer.value_width, mixer.indexer, mixer.compressed)
            cache = first.setdefault(shape, cache)
        joined.append(cache)
    return joined


def _layer_cache(mixer: MixerConfig | None, format: KvType, *, values_apart: bool) -> Cache:
    if isinstance(mixer, AttentionConfig) and mixer.cache_layer is None:
        return AttentionCache(mixer, format, values_apart=values_apart)
    if isinstance(mixer, RecurrentConfig):
        return RecurrentCache(mixer)
    if isinstance(mixer, CombinedConfig):
        attention = AttentionCache(mixer.attention, format, values_apart=values_apart)
        return JoinedCache(attention, RecurrentCache(mixer.recurrent))
    return JoinedCache(None, None)


def _owner(mixer: MixerConfig | None, index: int) -> int:
    """The layer whose keys and values layer `index` reads."""
    shared = mixer.cache_layer if isinstance(mixer, AttentionConfig) else None
    return index if shared is None else shared
