"""Keys and values of past tokens: one growing array per slot and layer. Knows layouts, not models or requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.errors import ContextFullError
from engine.model.batch import Span
from engine.model.config import AttentionConfig

KV_TYPES: dict[str, type[np.float16] | type[np.float32]] = {"f16": np.float16, "f32": np.float32}

FIRST_CAPACITY = 256
"""Tokens a slot has room for at first; doubles when full."""

CacheArray = npt.NDArray[np.float16 | np.float32]


class KVCache:
    """Cache of `n_slots` sequences of at most `context_length` tokens.

    A slot holds, per layer, keys (K, capacity, Hd) and values (K, capacity, Hv), or views of the keys where values are
    parts of them. Capacity doubles as tokens come, so that memory follows use. Where a row is written depends on
    the span alone: an interrupted step can be run again.
    """

    def __init__(
        self, layers: Sequence[AttentionConfig], *, context_length: int, n_slots: int = 1, kv_type: str = "f16"
    ) -> None:
        self.context_length = context_length
        self._layers = tuple(layers)
        self._dtype = KV_TYPES[kv_type]
        self._keys: list[list[CacheArray]] = [[] for _ in range(n_slots)]
        self._values: list[list[CacheArray]] = [[] for _ in range(n_slots)]
        self._filled = [0] * n_slots
        self._versions = [0] * n_slots

    @property
    def n_slots(self) -> int:
        """Sequences the cache can hold."""
        return len(self._filled)

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes over all layers."""
        widths = sum(
            layer.n_kv_heads * (layer.key_width + (0 if layer.values_in_keys else layer.value_width))
            for layer in self._layers
        )
        return widths * np.dtype(self._dtype).itemsize

    @property
    def allocated_bytes(self) -> int:
        """Bytes held now."""
        slots = (*self._keys, *self._values)
        return sum(array.nbytes for arrays in slots for array in arrays if array.base is None)

    def length(self, slot: int) -> int:
        """Tokens a slot holds for certain."""
        return self._filled[slot]

    def version(self, slot: int) -> int:
        """Changes whenever arrays of the slot move, so that addresses taken of them are void."""
        return self._versions[slot]

    def arrays(self, layer: int, slot: int) -> tuple[CacheArray, CacheArray]:
        """Keys (K, capacity, Hd) and values (K, capacity, Hv) of a slot, with room for what was reserved."""
        return self._keys[slot][layer], self._values[slot][layer]

    def reserve(self, spans: Sequence[Span]) -> None:
        """Make room for the rows of a step.

        Raises:
            ContextFullError: a sequence would become longer than the context; nothing was changed.
        """
        for span in spans:
            assert 0 <= span.slot < self.n_slots, f"slot {span.slot} of {self.n_slots}"
            assert 0 <= span.n_past <= self._filled[span.slot], "n_past lies beyond what the slot holds"
            if span.n_total > self.context_length:
                raise ContextFullError(span.n_total, self.context_length)
        for span in spans:
            # Rows from n_past on are about to be overwritten: until commit() they do not count.
            self._filled[span.slot] = span.n_past
            self._grow(span.slot, span.n_total)

    def commit(self, spans: Sequence[Span]) -> None:
        """Count the rows of a step that went through all layers."""
        for span in spans:
            self._filled[span.slot] = span.n_total

    def append(self, layer: int, span: Span, k: npt.NDArray[np.float32], v: npt.NDArray[np.float32]) -> None:
        """Store the new rows of one span: k (n_rows, K, Hd), v (n_rows, K, Hv)."""
        self._keys[span.slot][layer][:, span.n_past : span.n_total] = k.transpose(1, 0, 2)
        if not self._layers[layer].values_in_keys:
            self._values[span.slot][layer][:, span.n_past : span.n_total] = v.transpose(1, 0, 2)

    def view(self, layer: int, span: Span) -> tuple[CacheArray, CacheArray]:
        """Keys (K, n_total, Hd) and values (K, n_total, Hv) of one sequence, as views."""
        return self._keys[span.slot][layer][:, : span.n_total], self._values[span.slot][layer][:, : span.n_total]

    def release(self, slot: int) -> None:
        """Forget a sequence and give its memory back."""
        self._filled[slot] = 0
        self._keys[slot] = []
        self._values[slot] = []
        self._versions[slot] += 1

    def _grow(self, slot: int, needed: int) -> None:
        keys, values = self._keys[slot], self._values[slot]
        if len(values) == len(self._layers) and values[-1].shape[1] >= needed:
            return
        self._versions[slot] += 1
        # Layer by layer, so that only one layer exists twice, and so that an interruption leaves all of them valid.
        for index, layer in enumerate(self._layers):
            for arrays, width in ((keys, layer.key_width), (values, layer.value_width)):
                if arrays is values and layer.values_in_keys:
                    values[index : index + 1] = [keys[index][..., :width]]
                elif index == len(arrays):
                    arrays.append(np.zeros((layer.n_kv_heads, self._capacity(0, needed), width), dtype=self._dtype))
                elif arrays[index].shape[1] < needed:
                    old = arrays[index]
                    new = np.zeros((old.shape[0], self._capacity(old.shape[1], needed), width), dtype=self._dtype)
                    new[:, : old.shape[1]] = old
                    arrays[index] = new

    def _capacity(self, current: int, needed: int) -> int:
        return min(max(FIRST_CAPACITY, 2 * current, needed), self.context_length)
