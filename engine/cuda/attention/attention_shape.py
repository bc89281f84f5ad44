"""What the attention kernels are built for: heads, cache type, and what differs from layer to layer. Knows no card."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from engine.config import PAGE, KvType
from engine.cuda.driver.arrays import DeviceArray

LARGEST_HEAD = 576
ALIGNED = 4
"""Floats: kernels read so many of a row of qkv at once, so gates behind the heads take whole groups."""


class KernelRopeStyle(IntEnum):
    """Which elements of a head turn together."""

    ADJACENT = 0  # (2i, 2i+1), the llama layout of GGUF
    HALVES = 1  # (i, i + rope_dim/2), the NeoX layout


@dataclass(frozen=True)
class AttentionShape:
    """What is the same in every layer of a model; part of the kernels' build key.

    Attributes:
        heads: query heads H, a multiple of kv_heads.
        kv_heads: cache heads K.
        key_dim: Hk. value_dim: Hv. Both 1..576; up to 256, multiples of 16 use tensor cores with a float16 cache, and
            multiples of 32 with one of 8 bits.
        rope_dim: leading elements of a head that are rotated, even, 0..Hk; the rest passes through.
        rope_style: pairs of the rotation.
        kv_type: number format of the cache.
        alibi: scores lose a slope times the distance; not with tensor cores.
        distances: scores gain a number for each distance up to this one in both directions; 0 = they do not. Not with
            tensor cores, and in prompts alone.
        both_ways: a token sees later ones of its text, too, which is in one batch: there are no decode steps.
        values_in_keys: a value is the first Hv numbers of its key, which has more, and keys alone are cached; not with
            tensor cores.
        unmarked: keys carry no such mark, and may be their values: kernels that read single positions alone read them.
        stretch: ranges of positions in decode steps are so many times as long: 1, 2 or 4. Microseconds on an H200, 32
            heads of 128 over 8: 256 sequences of 1500 412 with 1 and 376 with 4 (a cache of bytes: 303, 279 and 252
            with 1, 2 and 4), one of 1024 5.8 and 13.8 (6.9 and 10.7 with 1 and 2).
        gate: floats of a row behind queries, keys and values, which the kernels do not read; a multiple of ALIGNED.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    rope_dim: int
    rope_style: KernelRopeStyle
    kv_type: KvType
    alibi: bool = False
    values_in_keys: bool = False
    gate: int = 0
    distances: int = 0
    both_ways: bool = False
    unmarked: bool = False
    stretch: int = 1

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0, f"{self.heads} heads do not share {self.kv_heads} cache heads"
        assert 0 < self.key_dim <= LARGEST_HEAD, self.key_dim
        assert 0 < self.value_dim <= LARGEST_HEAD, self.value_dim
        marked = self.values_in_keys and not self.unmarked
        assert not marked or self.value_dim < self.key_dim, "kernels mark a key behind its value"
        assert self.gate % ALIGNED == 0, self.gate
        assert self.rope_dim in range(0, self.key_dim + 1, 2), self.rope_dim

    @property
    def row_width(self) -> int:
        """Floats of one row of qkv."""
        return self.heads * self.key_dim + self.kv_heads * (self.key_dim + self.value_dim) + self.gate

    @property
    def cached_width(self) -> int:
        """Numbers that the cache holds of a position and cache head."""
        return self.key_dim if self.values_in_keys else self.key_dim + self.value_dim

    @property
    def cached_bytes(self) -> int:
        """Bytes of a position and cache head, scales included."""
        widths = (self.key_dim,) if self.values_in_keys else (self.key_dim, self.value_dim)
        return sum(map(self.kv_type.row_bytes, widths))

    @property
    def tensor_cores(self) -> bool:
        """Whether the float16 tensor-core kernels serve this shape; the plain float32 kernels serve every shape."""
        fits = all(dim % 16 == 0 and dim <= 256 for dim in (self.key_dim, self.value_dim))
        return self.kv_type is not KvType.F32 and fits and not (self.alibi or self.distances or self.values_in_keys)

    @property
    def bytes_cached(self) -> bool:
        """Whether the cache holds blocks of bytes with a scale, as cached_rows.cuh describes them."""
        return self.kv_type is KvType.Q8_0

    def cache_array(self, n_pages: int, width: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of an array of keys or values, `width` numbers a head.

        Of bytes, each page and head has PAGE rows of int8 plus 128, then PAGE rows of float16, one for each block.
        """
        if self.bytes_cached:
            return (n_pages, self.kv_heads, PAGE * self.kv_type.row_bytes(width)), np.dtype(np.uint8)
        return (n_pages, self.kv_heads, PAGE, width), np.dtype(f"f{self.kv_type.float_bytes}")

    @property
    def head_tile(self) -> int:
        """Query heads of one cache head that one decode block serves; a larger group takes several blocks."""
        if self.tensor_cores:
            return 8
        return min(self.heads // self.kv_heads, 8 if self.value_dim <= 256 else 4)

    @property
    def active_heads(self) -> int:
        """Heads of a tile that exist."""
        return min(self.head_tile, self.heads // self.kv_heads)

    @property
    def head_tiles(self) -> int:
        """Decode blocks side by side for one cache head."""
        return -(-(self.heads // self.kv_heads) // self.head_tile)

    def defines(self) -> dict[str, object]:
        """Preprocessor names of the kernels."""
        return {
            "HEADS": self.heads,
            "KV_HEADS": self.kv_heads,
            "KEY_DIM": self.key_dim,
            "VALUE_DIM": self.value_dim,
            "ROPE_DIM": self.rope_dim,
            "ROPE_HALVES": int(self.rope_style is KernelRopeStyle.HALVES),
            "CACHE_HALF": int(self.kv_type is KvType.F16),
            "PAGE": PAGE,
            **({"CACHE_Q8": 1} if self.bytes_cached else {}),
            **({"ALIBI": 1} if self.alibi else {}),
            **({"VALUES_IN_KEYS": 1} if self.values_in_keys else {}),
            **({"GATE": self.gate} if self.gate else {}),
            **({"DISTANCES": self.distances} if self.distances else {}),
            **({"BOTH_WAYS": 1} if self.both_ways else {}),
            **({"UNMARKED": 1} if self.unmarked else {}),
        }


assert PAGE & (PAGE - 1) == 0, "kernels find a position in its page by masking"
assert PAGE % 32 == 0, "a tile of the plain kernels is 32 positions of one page"


@dataclass(frozen=True)
class LayerAttention:
    """What may differ from layer to layer; passed at launch.

    Attributes:
        scale: factor of q.k, usually Hk ** -0.5.
        inv_freq: float64 (rope_dim/2,), frequency factors and YaRN ramps folded in; None only where rope_dim is 0.
        temperature: queries are multiplied by 1 + temperature * ln(1 + (position + temperature_offset) //
            temperature_length); 0 = off.
        rope_scale: factor of cos and sin (YaRN's attention factor), else 1.
        q_norm: float32 (Hk,) RMS-norm weight over each query head, or None. k_norm: the same for keys.
        norm_eps: epsilon of those norms.
        window: a token sees itself and the window-1 tokens before it; 0 = everything before it; -n = of that, what its
            chunk of n positions holds. Where shape.both_ways, those at most window // 2 away; 0 = the whole text.
        softcap: scores become softcap * tanh(score / softcap); 0 = off.
        sinks: float32 (H,) logit per head that joins the softmax without a value, or None.
        slopes: float32 (H,) what a score loses per position between query and key, or with shape.distances float32
            (H, 2 * distances + 1) what it gains by the distance key - query; None without either.
    """

    scale: float
    inv_freq: DeviceArray | None = None
    rope_scale: float = 1.0
    temperature: float = 0.0
    temperature_length: int = 1
    temperature_offset: int = 0
    q_norm: DeviceArray | None = None
    k_norm: DeviceArray | None = None
    norm_eps: float = 1e-6
    window: int = 0
    softcap: float = 0.0
    sinks: DeviceArray | None = None
    slopes: DeviceArray | None = None
