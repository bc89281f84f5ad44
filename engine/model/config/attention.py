"""Hyper-parameters of attention: grouped queries, latent vectors, windows, gates and temperatures.

Each class gives the order of its operations. Rotation is in rope.py, the choice of positions in indexer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.model.config.compressed import CompressedConfig
from engine.model.config.indexer import IndexerConfig
from engine.model.config.rope import RopeConfig


class QkNorm(Enum):
    """Which elements of q (or k) are normalized together; the norm comes after bias and clamp."""

    HEAD = "head"  # each head alone, all with one weight (Hd,)
    EACH_HEAD = "each_head"  # each head alone, each with a weight of its own: (heads, Hd)
    WIDTH = "width"  # all heads of a token together: weight (heads · Hd,)


class QkWeights(Enum):
    """Weights of the norms of queries and keys."""

    BOTH = "both"
    NEITHER = "neither"
    QUERY_GAINS = "query_gains"  # attn_q_norm is one number per head, and keys have none


class OutputGate(Enum):
    """Where the gate of an attention's output comes from: the heads' values are multiplied by f(gate)."""

    IN_QUERY = "in_query"  # attn_q has 2 · Hd rows per head: its query, then its gate
    OWN = "own"  # attn_gate · (normalized input), H · Hv rows
    PER_HEAD = "per_head"  # likewise, with H rows: one number for all values of a head


class GateFunction(Enum):
    """f of an output gate."""

    SIGMOID = "sigmoid"
    SOFTPLUS = "softplus"  # ln(1 + exp(x))


@dataclass(frozen=True)
class AttentionTemperature:
    """Queries at position p are multiplied by 1 + scale · ln(1 + floor((p + offset) / length))."""

    scale: float
    length: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Keys and values from one low-rank latent vector per token (DeepSeek-2; arXiv 2405.04434).

    c = norm(kv_a x)[:rank] and a part r = rotate((kv_a x)[rank:]) that all heads share; a query head is q_nope (before
    q's rotated part) and q_rope. Here q comes from q_b norm(q_a x), or straight from attn_q where q_rank is None.

    Absorbed: head h scores c and r themselves: its query is [k_bₕ q_nopeₕ, q_ropeₕ], the one cached key is [c, r], the
    one cached value is c, and attention gives (T, H · rank), which v_bₕ (value_width, rank) turns into the output of
    the head before attn_output. AttentionConfig then says what the attention over the cache is: n_kv_heads = 1,
    key_width = rank + rope_width, value_width = rank.

    Not absorbed (files with one attn_kv_b): [k_nopeₕ, vₕ] = kv_bₕ c, keys [k_nopeₕ, r] and values vₕ are cached for
    every head: n_kv_heads = H, key_width = nope_width + rope_width.
    """

    rank: int
    q_rank: int | None
    nope_width: int
    rope_width: int
    value_width: int  # per head, after v_b
    absorbed: bool
    key_norm: bool = False  # r is normalized by attn_k_norm before it is rotated

    def cached(self, n_heads: int) -> tuple[int, int, int]:
        """What the cache holds per token: key/value heads, and the widths of a key and of a value."""
        if self.absorbed:
            return 1, self.rank + self.rope_width, self.rank
        return n_heads, self.nope_width + self.rope_width, self.value_width


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention of one layer: H query heads share K key/value heads.

    Order: projection, scale, bias, clamp, QK-norm and value norm, RoPE, QK-norm where after_rope, temperature, cache.
    A score is softcap(scale · q·k) - slope · |key position - query position| + a learned bias of that distance
    (relative_buckets), masked by the window; then softmax. What the heads give is gated; attn_output multiplies it.
    """

    n_heads: int
    n_kv_heads: int
    key_width: int
    value_width: int
    scale: float  # multiplies q·k
    rope: RopeConfig | None  # None = this layer rotates nothing
    causal: bool = True  # a query sees no later positions; otherwise all of its text, which a batch holds whole
    # Causal: a query sees this many positions, itself included. Else: those at most window // 2 away. None = all.
    window: int | None = None
    chunk: int | None = None  # positions are cut into chunks of so many, and a query sees those of its own; None = all
    qk_norm: QkNorm | None = None
    qk_norm_after_rope: bool = False
    qk_norm_weights: QkWeights = QkWeights.BOTH
    temperature: AttentionTemperature | None = None
    clamp: float | None = None  # q, k and v after bias are limited to [-clamp, clamp]
    softcap: float | None = None  # a score s becomes c · tanh(s / c), before the mask
    sinks: bool = False  # softmax counts one more score per head (attn_sinks), whose probability is dropped
    alibi: float = 0.0  # largest bias; slopes are in the weights, from rope.alibi_slopes; 0 = none
    latent: LatentConfig | None = None
    output_gate: OutputGate | None = None
    relative_buckets: int = 0  # kinds of distance, in both directions, that have a bias per head (T5); 0 = none
    gate_function: GateFunction = GateFunction.SIGMOID
    value_scale: float = 1.0  # multiplies the values; in the weights it is a factor of attn_output
    indexer: IndexerConfig | None = None  # chooses the positions that a query attends to; None = all that it may see
    value_norm: bool = False  # each head's values are normalized (NormKind.RMS), without a weight
    compressed: CompressedConfig | None = None  # the window is that of single positions; blocks are seen as well
    sub_norm: bool = False  # what attn_output reads is normalized by attn_sub_norm, all heads together
    cache_layer: int | None = None  # keys and values are those of this earlier layer; the layer has none of its own

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def plain(self) -> bool:
        """Whether q, k and v are projections of the input and a query sees all that window or chunk leave it."""
        return self.latent is None and self.indexer is None and self.compressed is None

    @property
    def values_in_keys(self) -> bool:
        """Whether a value is the first value_width numbers of its key, so that keys alone need to be cached."""
        return (self.latent is not None and self.latent.absorbed) or self.compressed is not None
