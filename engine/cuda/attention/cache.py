"""The KV cache on the device: one pool of pages of 64 positions, and the table that says which of them a slot reads.

Which page belongs to whom is decided elsewhere; here the table follows what it is told, changed entries only. All reads
and writes of pages are launches of one stream, so a page may be given to another sequence while steps of its last owner
are still under way: what they write comes before what the new owner writes, and nobody reads a position that he has
not written himself or been given written. Must not know of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.config import page_count
from engine.cuda.attention.attention import PAGE, AttentionShape
from engine.cuda.driver.failure import is_out_of_memory
from engine.cuda.driver.launch import launch
from engine.cuda.driver.staging import Mapped, Staging, addresses, kernel


def bytes_per_page(shapes: Sequence[AttentionShape]) -> int:
    """Bytes one page takes over all layers, keys and values."""
    return sum(PAGE * AttentionCache(shape).bytes_per_token for shape in shapes)


def page_table_bytes(context_length: int, n_slots: int) -> int:
    """Bytes of the table that says which pages a slot reads."""
    return 4 * n_slots * page_count(context_length)


class AttentionCache:
    """Keys and values of one layer; implements engine.model.cache.LayerCache.

    A window changes what attention reads, not what is kept.

    Attributes:
        keys: (N, K, PAGE, Hk) float16 or float32.
        values: (N, K, PAGE, Hv); the keys themselves where the shape says that keys contain them, as absorbed latent
            attention has them.
    """

    keys: Any
    values: Any

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape
        self.paged: tuple[Any, ...] = ()
        self.states: tuple[Any, ...] = ()
        self.bytes_per_state = 0

    @property
    def bytes_per_token(self) -> int:
        """See LayerCache.bytes_per_token."""
        return self._shape.kv_heads * self._shape.cached_width * (2 if self._shape.cache_half else 4)

    def allocate(self, n_pages: int, n_states: int = 0) -> None:
        """See LayerCache.allocate."""
        import cupy

        shape = self._shape
        dtype = cupy.float16 if shape.cache_half else cupy.float32
        # Zeroed once: a tensor-core tile multiplies the unwritten rest of a page by zero, which must not be NaN.
        self.keys = self.values = cupy.zeros((n_pages, shape.kv_heads, PAGE, shape.key_dim), dtype)
        self.paged = (self.keys,)
        if not shape.values_in_keys:
            self.values = cupy.zeros((n_pages, shape.kv_heads, PAGE, shape.value_dim), dtype)
            self.paged = (self.keys, self.values)


class SavedPages:
    """Pages in host memory: pinned, which kernels reach, or pageable where the system has no more of that.

    Attributes:
        n_pages: how many.
        n_bytes: host memory taken.
        arrays: uint64, address of the pages of each array.
        pinned: whether that is an address that kernels reach.

    Raises:
        DeviceError: there is no host memory of either kind.
    """

    def __init__(self, page_bytes: Sequence[int], n_pages: int) -> None:
        self.n_pages = n_pages
        self.n_bytes = n_pages * sum(page_bytes)
        # Not cleared: what an earlier owner of this memory has launched may still be reading or writing it.
        self._memory: Mapped | np.ndarray
        words = max(self.n_bytes, 4) // 4
        try:
            self._memory = Mapped((words,), np.uint32, clear=False)
            first = int(self._memory.device.data.ptr)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._memory = np.empty(words, np.uint32)
            first = int(self._memory.ctypes.data)
        self.pinned = isinstance(self._memory, Mapped)
        starts = np.concatenate([[0], np.cumsum(np.asarray(page_bytes[:-1], np.int64) * n_pages)])
        self.arrays = first + starts.astype(np.uint64)


class PagedCache:
    """Keys and values of all layers.

    Args:
        shapes: attention shape of each layer.
        n_pages: pages in all.
        context_length: positions of one sequence at most.
        n_slots: rows of the table.

    Attributes:
        layers: the cache of each layer. keys, values: their arrays.
        block_table: int32 (n_slots, pages of one sequence); -1 = no page.
    """

    def __init__(self, shapes: Sequence[AttentionShape], n_pages: int, context_length: int, n_slots: int) -> None:
        import cupy

        self.layers = [AttentionCache(shape) for shape in shapes]
        for layer in self.layers:
            layer.allocate(n_pages)
        self.keys, self.values = [layer.keys for layer in self.layers], [layer.values for layer in self.layers]
        self.n_pages = n_pages
        width = page_count(context_length)
        self._table = np.full((n_slots, width), -1, np.int32)  # what block_table holds, or will after the next flush
        self.block_table = cupy.asarray(self._table)
        self._pages: list[list[int]] = [[] for _ in range(n_slots)]
        self._dirty: dict[int, tuple[int, int]] = {}
        arrays = [array for layer in self.layers for array in layer.paged]
        self._page_bytes = [array.nbytes // n_pages for array in arrays]
        self._bases = addresses(arrays)
        self._addresses = cupy.asarray(self._bases)
        self._sizes = cupy.asarray(np.asarray(self._page_bytes, np.int64))

    def set_pages(self, slot: int, pages: list[int]) -> None:
        """The slot reads these pages from now on: page i holds positions i * PAGE and following.

        Pages behind the context, which a full sequence may have been given to run ahead in, are left out.
        """
        if pages == self._pages[slot]:
            return
        row = self._table[slot]
        used = pages[: len(row)]
        new = np.full_like(row, -1)
        new[: len(used)] = used
        assert not used or (new[: len(used)].min() >= 0 and new.max() < self.n_pages), "no such page"
        changed = np.flatnonzero(row != new)
        self._pages[slot] = list(pages)
        if len(changed):
            low, high = self._dirty.get(slot, (len(row), 0))
            self._dirty[slot] = min(low, int(changed[0])), max(high, int(changed[-1]) + 1)
            row[:] = new

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
        self._move(self._addresses, self._addresses, pairs, staging)

    def save_pages(self, pages: Sequence[int], staging: Staging) -> SavedPages:
        """Pages as host memory, in stream order: they may be overwritten by whatever is launched next."""
        saved = SavedPages(self._page_bytes, len(pages))
        pairs = [(page, i) for i, page in enumerate(pages)]
        if saved.pinned:
            self._move(self._addresses, saved.arrays, pairs, staging)
        else:
            self._move_each(self._bases, saved.arrays, pairs, "memcpyDeviceToHost")
        return saved

    def load_pages(self, saved: SavedPages, pages: Sequence[int], staging: Staging) -> None:
        """The opposite, into any pages; as many as were saved."""
        assert len(pages) == saved.n_pages
        if saved.pinned:
            self._move(saved.arrays, self._addresses, list(enumerate(pages)), staging)
        else:
            self._move_each(saved.arrays, self._bases, list(enumerate(pages)), "memcpyHostToDevice")

    def _move_each(self, sources: Any, targets: Any, pairs: Sequence[tuple[int, int]], kind: str) -> None:
        """As _move(), by a copy of the driver for each page of each array: from and to pageable memory it waits."""
        import cupy

        runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream().ptr
        for first, second, size in zip(sources.tolist(), targets.tolist(), self._page_bytes, strict=True):
            for source, target in pairs:
                at, to = first + source * size, second + target * size
                runtime.memcpyAsync(to, at, size, getattr(runtime, kind), stream)

    def _move(self, sources: Any, targets: Any, pairs: Sequence[tuple[int, int]], staging: Staging) -> None:
        if not pairs:
            return
        staging.rewind()
        placed = [staging.place(one) if isinstance(one, np.ndarray) else one for one in (sources, targets)]
        given = staging.place(np.asarray(pairs, np.int32).reshape(-1, 2))
        staging.send()
        args = (*placed, self._sizes, given)
        launch(kernel("copy_pages"), (len(pairs), len(self._page_bytes)), 256, args, pdl=False)
