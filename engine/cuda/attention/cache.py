"""The KV cache on the device: one pool of pages of 64 positions, and the table that says which of them a slot reads.

Which page belongs to whom is decided elsewhere; here the table follows what it is told, changed entries only. All reads
and writes of pages are launches of one stream, so a page may be given to another sequence while steps of its last owner
are still under way: what they write comes before what the new owner writes, and a sequence reads only positions that it
has written itself or was given written. Must not know of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.config import KvType, page_count
from engine.cuda.attention.attention import PAGE, AttentionShape
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.row_store import RowStore, SavedRows
from engine.cuda.driver.staging import Staging

MOST_TEXTS = 1024
"""Texts of a batch of whole texts: each takes a page at least."""


@dataclass(frozen=True)
class CacheShape:
    """What a layer caches of a position: keys and values of these heads, and so many numbers of an indexer's key."""

    heads: AttentionShape
    index_width: int = 0


@dataclass(frozen=True)
class BlockCacheShape:
    """What a layer with compressed blocks caches.

    Attributes:
        head: numbers of a key. left: numbers of a position that keys of blocks are made of.
        block_rows: most blocks that end in one page. index_width: numbers of a block's key of an index.
        kv_type: their format.
    """

    head: int
    left: int
    block_rows: int
    index_width: int
    kv_type: KvType

    @property
    def page_bytes(self) -> int:
        """Memory of one page."""
        rows = PAGE + self.block_rows
        return (rows * self.head + PAGE * self.left + self.block_rows * self.index_width) * self.kv_type.float_bytes


LayerShape = CacheShape | BlockCacheShape
"""What a layer caches of positions."""


def bytes_per_page(shapes: Sequence[LayerShape | None]) -> int:
    """Bytes one page takes over all layers; None: a layer without a cache."""
    found = [shape.page_bytes for shape in shapes if isinstance(shape, BlockCacheShape)]
    plain = (shape for shape in shapes if isinstance(shape, CacheShape))
    return sum(found) + sum(PAGE * AttentionCache(shape).bytes_per_token for shape in plain)


def page_table_bytes(context_length: int, n_slots: int) -> int:
    """Bytes of the table that says which pages a slot reads."""
    return 4 * n_slots * page_count(context_length)


class AttentionCache:
    """Keys and values of one layer; implements engine.model.cache.LayerCache.

    A window changes what attention reads, not what is kept.

    Attributes:
        keys: (N, K, PAGE, Hk) float16 or float32, or uint8 (N, K, bytes of a head): AttentionShape.cache_array.
        values: likewise with Hv; the keys themselves where the shape says that keys contain them, as absorbed latent
            attention has them.
        index_keys: (N, PAGE, Di) of an indexer, where the layer has one of its own.
    """

    keys: DeviceArray
    values: DeviceArray
    index_keys: DeviceArray

    def __init__(self, shape: CacheShape) -> None:
        self._shape, self._index_width = shape.heads, shape.index_width
        self.paged: tuple[DeviceArray, ...] = ()
        self.states: tuple[DeviceArray, ...] = ()
        self.bytes_per_state = 0

    @property
    def bytes_per_token(self) -> int:
        """See LayerCache.bytes_per_token."""
        shape = self._shape
        return shape.kv_heads * shape.cached_bytes + self._index_width * shape.kv_type.float_bytes

    def allocate(self, n_pages: int, n_states: int = 0) -> None:
        """See LayerCache.allocate."""
        import cupy

        shape = self._shape
        # Zeroed once: kernels may multiply any value of a page by zero, so it must be finite; writers keep it so.
        self.keys = self.values = cupy.zeros(*shape.cache_array(n_pages, shape.key_dim))
        self.paged = (self.keys,)
        if not shape.values_in_keys:
            self.values = cupy.zeros(*shape.cache_array(n_pages, shape.value_dim))
            self.paged = (self.keys, self.values)
        if self._index_width:
            floats = np.dtype(f"f{shape.kv_type.float_bytes}")
            self.index_keys = cupy.zeros((n_pages, PAGE, self._index_width), floats)
            self.paged += (self.index_keys,)


class BlockCache:
    """What a layer with compressed blocks caches; implements engine.model.cache.LayerCache. All in the cache's format.

    Attributes:
        keys: (N, PAGE + blocks that end in a page, Hd), positions and then blocks; keys are values too.
        left: (N, PAGE, .) what keys of blocks are made of, where there are blocks.
        index_keys: (N, blocks that end in a page, Di), where an index chooses among them.
    """

    keys: DeviceArray
    left: DeviceArray
    index_keys: DeviceArray

    def __init__(self, shape: BlockCacheShape) -> None:
        self._shape = shape
        self.bytes_per_token = -(-shape.page_bytes // PAGE)
        self.bytes_per_state = 0
        self.paged: tuple[DeviceArray, ...] = ()
        self.states: tuple[DeviceArray, ...] = ()

    def allocate(self, n_pages: int, n_states: int = 0) -> None:
        """See LayerCache.allocate."""
        import cupy

        shape, dtype = self._shape, np.dtype(f"f{self._shape.kv_type.float_bytes}")
        self.keys = cupy.zeros((n_pages, PAGE + shape.block_rows, shape.head), dtype)
        self.paged = (self.keys,)
        if shape.left:
            self.left = cupy.zeros((n_pages, PAGE, shape.left), dtype)
            self.paged += (self.left,)
        if shape.index_width:
            self.index_keys = cupy.zeros((n_pages, shape.block_rows, shape.index_width), dtype)
            self.paged += (self.index_keys,)


class PagedCache:
    """Keys and values of all layers.

    Args:
        shapes: what each layer caches; None for a layer without attention, which has no pages.
        n_pages: pages in all.
        context_length: positions of one sequence at most.
        n_slots: rows of the table.
        owners: for every layer the one whose cache it reads; None: its own.

    Attributes:
        layers: the cache of each layer, or None.
        block_table: int32 (n_slots, pages of one sequence); -1 = no page.
        lengths: None: a token sees no later ones.
    """

    lengths: None = None

    def __init__(
        self,
        shapes: Sequence[LayerShape | None],
        n_pages: int,
        context_length: int,
        n_slots: int,
        owners: Sequence[int] | None = None,
    ) -> None:
        import cupy

        self._owners = range(len(shapes)) if owners is None else owners
        self.layers = [_cache_of(shape) for shape in shapes]
        caches = [layer for layer in self.layers if layer is not None]
        for layer in caches:
            layer.allocate(n_pages)
        self.n_pages = n_pages
        width = page_count(context_length)
        self._table = np.full((n_slots, width), -1, np.int32)  # what block_table holds, or will after the next flush
        self.block_table = cupy.asarray(self._table)
        # The last list of each slot, and how many of its entries are set.
        self._told: list[tuple[list[int], int]] = [([], 0)] * n_slots
        self._dirty: dict[int, tuple[int, int]] = {}
        self._store = RowStore([array for layer in caches for array in layer.paged])

    def arrays(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        """The keys and values that a layer reads."""
        found = self.layers[self._owners[layer]]
        assert isinstance(found, AttentionCache)
        return found.keys, found.values

    def blocks(self, layer: int) -> BlockCache:
        """What a layer with compressed blocks caches."""
        found = self.layers[layer]
        assert isinstance(found, BlockCache)
        return found

    def index_keys(self, layer: int) -> DeviceArray:
        """The keys of a layer's own indexer."""
        found = self.layers[layer]
        assert isinstance(found, AttentionCache)
        return found.index_keys

    def set_pages(self, slot: int, pages: list[int]) -> None:
        """The slot reads these pages from now on: page i holds positions i * PAGE and following.

        Pages behind the context, which a full sequence may have been given to run ahead in, are left out. The list is
        kept to know it again, and may only grow.
        """
        told, n = self._told[slot]
        if told is pages and n == len(pages):  # mostly
            return
        row = self._table[slot]
        used, n = pages[: len(row)], min(n, len(row))
        assert not used or (min(used) >= 0 and max(used) < self.n_pages), "no such page"
        low, high = n if told is pages else 0, max(n, len(used))
        self._told[slot] = [], high  # cut short from here on, the next call sends all that may have changed
        row[low : len(used)] = used[low:]
        row[len(used) : high] = -1
        if low < high:
            first, end = self._dirty.get(slot, (low, high))
            self._dirty[slot] = min(first, low), max(end, high)
        self._told[slot] = pages, len(pages)

    def flush(self, staging: Staging) -> None:
        """Puts changed entries of the table on their way."""
        width = self._table.shape[1]
        for slot, (low, high) in self._dirty.items():
            staging.put(self.block_table, slot * width + low, self._table[slot, low:high])
        self._dirty.clear()

    def touch(self) -> None:
        """Every entry is sent again with the next flush."""
        self._dirty = dict.fromkeys(range(len(self._table)), (0, self._table.shape[1]))

    # ---- whole pages -----------------------------------------------------------------------------------------

    def copy_pages(self, pairs: Sequence[tuple[int, int]], staging: Staging) -> None:
        """Copies (source, target) pages, all layers; a target must not be a source or occur twice."""
        self._store.copy(pairs, staging)

    def save_pages(self, pages: Sequence[int], staging: Staging) -> SavedRows:
        """Pages as host memory, in stream order: they may be overwritten by whatever is launched next."""
        return self._store.save(pages, staging)

    def load_pages(self, saved: SavedRows, pages: Sequence[int], staging: Staging) -> None:
        """The opposite, into any pages; as many as were saved."""
        self._store.load(saved, pages, staging)


def _cache_of(shape: LayerShape | None) -> AttentionCache | BlockCache | None:
    if shape is None:
        return None
    return BlockCache(shape) if isinstance(shape, BlockCacheShape) else AttentionCache(shape)


class TextCache:
    """Keys and values of a batch of whole texts: read in the layer that writes them, so layers share arrays.

    Args:
        shapes: attention shape of each layer; None for a layer without attention.
        n_pages: pages that all texts of a batch fit into.

    Attributes:
        block_table: int32 (texts, pages of the longest); pages follow one another, text by text.
        lengths: int32 (texts,), tokens of each.
        spans: int32 (texts, 2), first row in the batch and number of rows of each.
    """

    block_table: DeviceArray
    lengths: DeviceArray
    spans: DeviceArray

    def __init__(self, shapes: Sequence[AttentionShape | None], n_pages: int) -> None:
        self._shapes = shapes
        different = (shape for shape in dict.fromkeys(shapes) if shape is not None)
        self._caches = {shape: AttentionCache(CacheShape(shape)) for shape in different}
        for cache in self._caches.values():
            cache.allocate(n_pages)
        self._n_pages = n_pages
        self._lengths = np.zeros(0, np.int32)

    def seat(self, lengths: Sequence[int]) -> None:
        """The texts of the batch that follows, by their tokens."""
        self._lengths = np.asarray(lengths, np.int32)

    def arrays(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        """Keys and values of a layer that has attention."""
        shape = self._shapes[layer]
        assert shape is not None
        return self._caches[shape].keys, self._caches[shape].values

    def flush(self, staging: Staging) -> None:
        """Puts the tables of the batch on their way, into the arena of the batch."""
        pages = -(-self._lengths // PAGE)
        ends, places = np.cumsum(pages), np.arange(pages.max())
        assert ends[-1] <= self._n_pages, f"{ends[-1]} pages of texts, room for {self._n_pages}"
        table = np.where(places < pages[:, None], (ends - pages)[:, None] + places, -1)
        self.block_table = staging.place(table.astype(np.int32))
        self.lengths = staging.place(self._lengths)
        first = np.cumsum(self._lengths) - self._lengths
        self.spans = staging.place(np.stack([first, self._lengths], axis=1).astype(np.int32))


def text_pages(rows: int) -> int:
    """Pages that any batch of whole texts with so many tokens fits into."""
    return page_count(rows) + min(MOST_TEXTS, rows)


def text_cache_bytes(shapes: Sequence[AttentionShape | None], n_pages: int) -> int:
    """Bytes of a TextCache."""
    different = [CacheShape(shape) for shape in dict.fromkeys(shapes) if shape is not None]
    return n_pages * bytes_per_page(different)
