"""The KV cache on the device: pages of 64 positions, and the table that says which pages a sequence owns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.cuda.attention import PAGE, AttentionShape


def page_count(context_length: int) -> int:
    """Pages one sequence of that many positions needs."""
    return -(-context_length // PAGE)


def bytes_per_page(shapes: Sequence[AttentionShape]) -> int:
    """Bytes one page takes over all layers, keys and values."""
    return sum(PAGE * s.kv_heads * (s.key_dim + s.value_dim) * (2 if s.cache_half else 4) for s in shapes)


class PagedCache:
    """Keys and values of all layers.

    Each slot owns a fixed run of pages, so a slot can never run into another one; the kernels see only the table.

    Args:
        shapes: attention shape of each layer.
        context_length: positions of one slot.
        n_slots: sequences.

    Attributes:
        keys: per layer (N, K, PAGE, Hk) float16 or float32.
        values: per layer (N, K, PAGE, Hv).
        block_table: int32 (n_slots, pages of one slot).
    """

    def __init__(self, shapes: Sequence[AttentionShape], context_length: int, n_slots: int) -> None:
        import cupy

        pages = page_count(context_length)
        self.keys: list[Any] = []
        self.values: list[Any] = []
        for shape in shapes:
            dtype = cupy.float16 if shape.cache_half else cupy.float32
            # Zeroed once: a tensor-core tile multiplies the unwritten rest of a page by zero, which must not be NaN.
            self.keys.append(cupy.zeros((n_slots * pages, shape.kv_heads, PAGE, shape.key_dim), dtype))
            self.values.append(cupy.zeros((n_slots * pages, shape.kv_heads, PAGE, shape.value_dim), dtype))
        self.block_table = cupy.asarray(np.arange(n_slots * pages, dtype=np.int32).reshape(n_slots, pages))
