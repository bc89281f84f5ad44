"""Pages of keys and values of one layer on the CPU. It decides layouts; independent of models and requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import KV_BLOCK, PAGE, KvType
from engine.cpu.memory import aligned_zeros
from engine.model.config import AttentionConfig
from engine.model.kv_format import dequantize, quantize

DTYPES = {KvType.F16: np.float16, KvType.F32: np.float32, KvType.Q8_0: np.float16}
"""Of what is kept as float."""

CacheArray = npt.NDArray[np.float16 | np.float32]
Pages = npt.NDArray[np.float16 | np.float32 | np.int8]
PageTable = npt.NDArray[np.int64]


@dataclass(frozen=True)
class QuantizedPages:
    """Keys or values of N pages, of 8 bits: the int8 of a head's page, then their scales, block by block.

    Attributes:
        memory: uint8 (N, K, PAGE * bytes of a row).
        quants: int8 (N, K, PAGE, W), in memory (.., W, PAGE) if turned, with gaps where the scales are.
        scales: float16 (N, K, PAGE, W / KV_BLOCK), in memory (.., W / KV_BLOCK, PAGE).
    """

    memory: npt.NDArray[np.uint8]
    quants: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float16]

    @classmethod
    def zeros(cls, n_pages: int, heads: int, width: int, *, turned: bool) -> QuantizedPages:
        """Pages of zeros; memory follows use."""
        memory = aligned_zeros(n_pages, heads, PAGE * KvType.Q8_0.row_bytes(width), dtype=np.uint8)
        quants = memory[..., : PAGE * width].view(np.int8)
        shape = (width, PAGE) if turned else (PAGE, width)
        quants = np.lib.stride_tricks.as_strided(quants, (n_pages, heads, *shape), (*memory.strides[:2], shape[1], 1))
        scales = memory[..., PAGE * width :].view(np.float16)
        scales = np.lib.stride_tricks.as_strided(
            scales, (n_pages, heads, width // KV_BLOCK, PAGE), (*memory.strides[:2], 2 * PAGE, 2)
        )
        return cls(memory, quants.swapaxes(2, 3) if turned else quants, scales.swapaxes(2, 3))

    def store(self, pages: PageTable, places: npt.NDArray[np.int64], rows: npt.NDArray[np.float32]) -> None:
        """Write rows (T, K, W) at places (T,) of pages (T,)."""
        self.quants[pages, :, places], self.scales[pages, :, places] = quantize(rows)

    def gather(self, pages: PageTable) -> npt.NDArray[np.float32]:
        """The rows (n, K, PAGE, W) of pages (n,), in a new array."""
        return dequantize(self.quants[pages], self.scales[pages])


class AttentionCache:
    """Keys and values of one layer; implements engine.model.cache.LayerCache.

    Keys (N, K, PAGE, Hd), in memory (N, K, Hd, PAGE), and values (N, K, PAGE, Hv) of N pages, of 8 bits the quants of
    QuantizedPages; where the layer has an indexer, its keys (N, PAGE, Di) too, or what blocks of positions are made of,
    and then the keys of the blocks that end in a page: (N, blocks, W). Memory follows use: the system gives a page's
    memory when it is first written. A window changes what attention reads, not what is kept.

    Args:
        attention: head counts and widths.
        kv_type: number format.
        values_apart: keep values in an array of their own also where they are parts of the keys, as absorbed latent
            attention has them; the attention kernel reads keys and values in different orders.
    """

    keys: Pages
    values: Pages
    index_keys: CacheArray
    block_keys: CacheArray

    def __init__(self, attention: AttentionConfig, kv_type: KvType, *, values_apart: bool) -> None:
        self._attention = attention
        self._kv_type = kv_type
        self._dtype = DTYPES[kv_type]
        self._quantized: tuple[QuantizedPages, QuantizedPages] | None = None
        self._in_keys = attention.values_in_keys and not values_apart
        self._index_width = 0 if attention.indexer is None else attention.indexer.cached_width
        self._block_length, self._block_width = PAGE, 0
        compressed = attention.compressed
        if compressed is not None and compressed.blocks is not None:
            self._index_width = compressed.position_width(attention.key_width)
            self._block_length, self._block_width = (
                compressed.blocks.length,
                compressed.block_width(attention.key_width),
            )
        self.bytes_per_state = 0
        self.paged: tuple[npt.NDArray[Any], ...] = ()
        self.states: tuple[CacheArray, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        """See LayerCache.bytes_per_token."""
        layer = self._attention
        widths = (layer.key_width,) if self._in_keys else (layer.key_width, layer.value_width)
        beside = self._index_width + -(-self._page_blocks * self._block_width // PAGE)
        return layer.n_kv_heads * sum(map(self._kv_type.row_bytes, widths)) + beside * self._kv_type.float_bytes

    @property
    def _page_blocks(self) -> int:
        """Most blocks that end in one page."""
        return -(-PAGE // self._block_length)

    def allocate(self, n_pages: int, n_states: int = 0) -> None:
        """See LayerCache.allocate."""
        layer, heads = self._attention, self._attention.n_kv_heads
        # Neighbouring positions of a key's element are adjacent in memory: attention loads them as one vector.
        if self._kv_type is KvType.Q8_0:
            assert not self._in_keys, "what is key and value at once stays float"
            both = (
                QuantizedPages.zeros(n_pages, heads, layer.key_width, turned=True),
                QuantizedPages.zeros(n_pages, heads, layer.value_width, turned=False),
            )
            self._quantized, self.paged = both, tuple(each.memory for each in both)
            self.keys, self.values = (each.quants for each in both)
        else:
            keys = aligned_zeros(n_pages, heads, layer.key_width, PAGE, dtype=self._dtype)
            self.keys = keys.transpose(0, 1, 3, 2)
            if self._in_keys:
                self.values = self.keys[..., : layer.value_width]
                self.paged = (self.keys,)
            else:
                self.values = aligned_zeros(n_pages, heads, PAGE, layer.value_width, dtype=self._dtype)
                self.paged = (self.keys, self.values)
        if self._index_width:
            self.index_keys = aligned_zeros(n_pages, PAGE, self._index_width, dtype=self._dtype)
            self.paged += (self.index_keys,)
        if self._block_width:
            self.block_keys = aligned_zeros(n_pages, self._page_blocks, self._block_width, dtype=self._dtype)
            self.paged += (self.block_keys,)

    def append(
        self,
        pages: PageTable,
        positions: npt.NDArray[np.int64],
        k: npt.NDArray[np.float32],
        v: npt.NDArray[np.float32],
    ) -> None:
        """Store rows k (T, K, Hd) and v (T, K, Hv) at positions (T,) of a sequence with these pages."""
        at, places = pages[positions // PAGE], positions % PAGE
        if self._quantized is not None:
            for cached, rows in zip(self._quantized, (k, v), strict=True):
                cached.store(at, places, rows)
            return
        self.keys[at, :, places] = k
        if not self._in_keys:
            self.values[at, :, places] = v

    def append_index(self, pages: PageTable, positions: npt.NDArray[np.int64], k: npt.NDArray[np.float32]) -> None:
        """Store keys k (T, Di) of the indexer at positions (T,) of a sequence with these pages."""
        self.index_keys[pages[positions // PAGE], positions % PAGE] = k

    def view_index(self, pages: PageTable, n_positions: int, first: int = 0) -> CacheArray:
        """Keys (T - first, Di) of the indexer at positions `first` to T - 1 of these pages, in a new array."""
        skipped = first // PAGE
        keys: CacheArray = self.index_keys[pages[skipped:]].reshape(-1, self._index_width)
        return keys[first - skipped * PAGE : n_positions - skipped * PAGE]

    def store_blocks(self, pages: PageTable, first: int, keys: npt.NDArray[np.float32]) -> None:
        """Store the keys (B, W) of the blocks from number `first` on of a sequence with these pages."""
        self.block_keys[self._block_places(pages, np.arange(first, first + len(keys)))] = keys

    def view_blocks(self, pages: PageTable, n_blocks: int) -> CacheArray:
        """Keys (B, W) of the first B blocks of these pages, gathered into a new array."""
        keys: CacheArray = self.block_keys[self._block_places(pages, np.arange(n_blocks))]
        return keys

    def _block_places(
        self, pages: PageTable, blocks: npt.NDArray[np.intp]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.intp]]:
        """Page and place of each block: those of its last position."""
        last = (blocks + 1) * self._block_length - 1
        return pages[last // PAGE], last % PAGE // self._block_length

    def view(self, pages: PageTable, n_positions: int) -> tuple[CacheArray, CacheArray]:
        """Keys (K, T, Hd) and values (K, T, Hv) of the first T positions of these pages, gathered into new arrays.

        What was quantized is float32 there.
        """
        if self._quantized is None:
            gathered: list[npt.NDArray[Any]] = [array[pages] for array in (self.keys, self.values)]
        else:
            gathered = [each.gather(pages) for each in self._quantized]
        keys, values = (
            array.transpose(1, 0, 2, 3).reshape(array.shape[1], -1, array.shape[3])[:, :n_positions]
            for array in gathered
        )
        return keys, values
