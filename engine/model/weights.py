"""Weights as the file stores them: packed, mapped views, and the small vectors beside them as float32.

Nothing here expands a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.model.config import LayerConfig, ResidualKind
from engine.model.indexer_weights import IndexerWeights
from engine.model.matrices import ExpertLinear as ExpertLinear
from engine.model.matrices import Float32Array as Float32Array
from engine.model.matrices import Linear as Linear
from engine.model.matrices import Norm as Norm
from engine.model.matrices import Weight as Weight
from engine.model.ngram_weights import NgramWeights
from engine.model.recurrent_weights import ChannelMixWeights as ChannelMixWeights
from engine.model.recurrent_weights import DeltaNetWeights as DeltaNetWeights
from engine.model.recurrent_weights import KimiDeltaWeights as KimiDeltaWeights
from engine.model.recurrent_weights import LightningWeights as LightningWeights
from engine.model.recurrent_weights import LowRank as LowRank
from engine.model.recurrent_weights import Mamba2Weights as Mamba2Weights
from engine.model.recurrent_weights import MambaWeights as MambaWeights
from engine.model.recurrent_weights import Plamo2Weights as Plamo2Weights
from engine.model.recurrent_weights import RecurrentWeights as RecurrentWeights
from engine.model.recurrent_weights import Rwkv6Weights as Rwkv6Weights
from engine.model.recurrent_weights import Rwkv7Weights as Rwkv7Weights
from engine.model.recurrent_weights import ShortConvWeights as ShortConvWeights
from engine.model.rope import RopeTable
from engine.model.skip_weights import SkipWeights
from engine.model.stream_weights import (
    LaurelWeights,
    LayerInputWeights,
    PerLayerWeights,
    SpreadWeights,
    StreamWeights,
)


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
    LatentConfig.value_width). With AttentionConfig.cache_layer k and v are None. v_norm has no weight.
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

    @property
    def qkv(self) -> tuple[Linear, Linear, Linear]:
        """q, k and v, where attention is not latent."""
        assert self.q is not None
        assert self.k is not None
        assert self.v is not None
        return self.q, self.k, self.v


@dataclass(frozen=True, eq=False)
class FfnWeights:
    """gate and up (F, D), down (D, F); gate is None where the part is not gated.

    gate and up may be row ranges of one tensor. The activation's result is divided by act_scales (F,) float32.
    """

    gate: Linear | None
    up: Linear
    down: Linear
    act_scales: Float32Array | None = None
    sub_norm: Norm | None = None


@dataclass(frozen=True, eq=False)
class LatentExpertWeights:
    """Weights of MoeConfig.latent_width, L numbers: down (L, D), up (D, L), and a norm of L numbers or None."""

    down: Linear
    norm: Norm | None
    up: Linear


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertsWeights:
    """Experts alike: gate and up (E, F, D), down (E, D, F).

    gate and up may be row ranges of one stack; gate is None where experts have none. In a model with
    LatentExpertWeights D is L.
    """

    gate: ExpertLinear | None
    up: ExpertLinear
    down: ExpertLinear

    def expert(self, index: int) -> FfnWeights:
        """The feed-forward part of one expert."""
        gate = None if self.gate is None else self.gate.expert(index)
        return FfnWeights(gate, self.up.expert(index), self.down.expert(index))


@dataclass(frozen=True, eq=False, kw_only=True)
class MoeWeights(ExpertsWeights):
    """Experts with a router (E, D), and a shared expert and its gate (1, D) or None.

    selection_bias (E,) float32 joins the choice of experts only. norm is that of MoeConfig.reads_input, or with
    separate_norms that of the experts; only then there are router_norm, expert_post_norm and shared_post_norm, of what
    router, experts and shared part read or give.
    """

    router: Linear
    shared: FfnWeights | None
    shared_gate: Linear | None
    selection_bias: Float32Array | None = None
    norm: Norm | None = None
    adjugate: ExpertsWeights | None = None
    latent: LatentExpertWeights | None = None
    router_norm: Norm | None = None
    expert_post_norm: Norm | None = None
    shared_post_norm: Norm | None = None


@dataclass(frozen=True, eq=False)
class CombinedWeights:
    """Weights of CombinedConfig."""

    attention: AttentionWeights
    recurrent: RecurrentWeights


MixerWeights = AttentionWeights | RecurrentWeights | CombinedWeights
"""Weights of a layer's mixer, one class per class of engine.model.config.MixerConfig."""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer's constants and weights; at most one of `ffn`, `moe` and `channel_mix` is set.

    A norm that is None does nothing. What LayerConfig says that a layer lacks is None, and output_scale 1.
    mixer_skip and ffn_skip belong to residual connections that are more than a sum; embedding_scale is the factor of
    LayerConfig.embedding_skip.
    """

    config: LayerConfig
    attn_norm: Norm | None
    mixer: MixerWeights | None
    ffn_norm: Norm | None
    ffn: FfnWeights | None
    moe: MoeWeights | None
    attn_post_norm: Norm | None = None
    ffn_post_norm: Norm | None = None
    attn_output_norm: Norm | None = None
    attn_norm_2: Norm | None = None
    layer_output_norm: Norm | None = None
    mixer_skip: SkipWeights | None = None
    ffn_skip: SkipWeights | None = None
    ngrams: NgramWeights | None = None
    embedding_scale: float = 0.0
    closing_norm: Norm | None = None
    channel_mix: ChannelMixWeights | None = None
    laurel: LaurelWeights | None = None
    layer_input: LayerInputWeights | None = None
    streams: StreamWeights | None = None
    output_scale: float = 1.0

    @property
    def attention(self) -> AttentionWeights:
        """The attention of a layer that has it; an assertion fails for others."""
        mixer = self.mixer.attention if isinstance(self.mixer, CombinedWeights) else self.mixer
        assert isinstance(mixer, AttentionWeights)
        return mixer

    @property
    def recurrent(self) -> RecurrentWeights | None:
        """The recurrent mixer; None where the layer has none."""
        mixer = self.mixer.recurrent if isinstance(self.mixer, CombinedWeights) else self.mixer
        return mixer if isinstance(mixer, RecurrentWeights) else None

    @property
    def index(self) -> int:
        """Number of the layer, from 0."""
        return self.config.index

    @property
    def parallel(self) -> bool:
        """Whether the feed-forward part reads the layer's input (ResidualKind.PARALLEL)."""
        return self.config.residual is ResidualKind.PARALLEL


@dataclass(frozen=True, eq=False)
class PoolingWeights:
    """What follows pooling; None where the file has no such part.

    cls (N, D), cls_norm (N,) and cls_output (labels, N or D) are those of RankConfig; dense_2 (M, D) and dense_3
    (D', M) change embeddings.
    """

    cls: Linear | None = None
    cls_norm: Norm | None = None
    cls_output: Linear | None = None
    dense_2: Linear | None = None
    dense_3: Linear | None = None


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """The whole model: token_embd (V, D), output (V, D); `tied` says that the two are one tensor.

    position_embd (context, D) has learned positions or is None; token_types (D,) float32 is the vector of the first
    type. output is None in models that make embeddings alone, and output_norm where such a model has none. head_skip
    is that of the head, where residual connections are more than a sum. What ModelConfig says that a
    model lacks is None.
    """

    token_embd: Weight
    layers: tuple[LayerWeights, ...]
    output_norm: Norm | None
    output: Linear | None
    tied: bool
    embedding_norm: Norm | None = None
    position_embd: Weight | None = None
    head_skip: SkipWeights | None = None
    per_layer: PerLayerWeights | None = None
    spread: SpreadWeights | None = None
    token_types: Float32Array | None = None
    pooling: PoolingWeights = field(default_factory=PoolingWeights)

    @property
    def head(self) -> Linear:
        """The output projection of a model that predicts tokens; an assertion fails for others."""
        assert self.output is not None, "this model makes embeddings alone"
        return self.output
