"""Weights of attention: projections, their norms, and tables of positions.

Shapes are in terms of AttentionConfig and LatentConfig.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.rope import RopeTable
from engine.model.weights.compressed import CompressedWeights
from engine.model.weights.indexer import IndexerWeights
from engine.model.weights.matrices import ExpertLinear, Float32Array, Linear, Norm


@dataclass(frozen=True, eq=False)
class LatentWeights:
    """Weights of latent attention, in terms of LatentConfig.

    q_a (q_rank, D), q_b (H · (nope + rope), q_rank), or q (H · (nope + rope), D) alone; kv_a (rank + rope, D).
    Absorbed: k_b (H, rank, nope) and v_b (H, value, rank), one matrix per head. Else kv_b (H · (nope + value), rank),
    whose rows are, head by head, those of k and then those of v.
    """

    q: Linear | None
    q_a: Linear | None
    q_a_norm: Norm | None
    q_b: Linear | None
    kv_a: Linear
    kv_a_norm: Norm
    k_b: ExpertLinear | None
    v_b: ExpertLinear | None
    kv_b: Linear | None
    k_norm: Norm | None = None


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """q (H·Hd, D), k (K·Hd, D), v (K·Hv, D), output (D, H·Hv).

    q, k and v may be row ranges of one tensor. Norms are as AttentionConfig.qk_norm says; v is never normalized.
    sinks and alibi_slopes are float32 (H,) or None, relative_bias is (buckets, H) or None. gate is that of
    OutputGate.OWN, (H · Hv, D), or PER_HEAD, (H, D); with IN_QUERY q has 2 · H · Hd rows, and query_gate is its rows of
    queries and those of gates, as views. Where `latent` is set q, k and v are None, and output is (D, H ·
    LatentConfig.value_width). Where `compressed` is set they are None too, and output is (D, G · output_rank). With
    AttentionConfig.cache_layer k and v are None. v_norm has no weight.
    """

    output: Linear
    rope: RopeTable | None
    q: Linear | None = None
    k: Linear | None = None
    v: Linear | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sinks: Float32Array | None = None
    alibi_slopes: Float32Array | None = None
    latent: LatentWeights | None = None
    gate: Linear | None = None
    query_gate: tuple[Linear, Linear] | None = None
    relative_bias: Float32Array | None = None
    indexer: IndexerWeights | None = None
    v_norm: Norm | None = None
    sub_norm: Norm | None = None
    compressed: CompressedWeights | None = None

    @property
    def qkv(self) -> tuple[Linear, Linear, Linear]:
        """q, k and v, where attention is not latent."""
        assert self.q is not None
        assert self.k is not None
        assert self.v is not None
        return self.q, self.k, self.v
