"""Weights of a whole model, layer by layer: each layer has its configuration beside its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.model.config import LayerConfig, ResidualKind
from engine.model.weights.attention import AttentionWeights
from engine.model.weights.ffn import FfnWeights, MoeWeights
from engine.model.weights.matrices import Float32Array, Linear, Norm, Weight
from engine.model.weights.ngrams import NgramWeights
from engine.model.weights.recurrent import ChannelMixWeights, RecurrentWeights
from engine.model.weights.skips import SkipWeights
from engine.model.weights.streams import LaurelWeights, LayerInputWeights, PerLayerWeights, SpreadWeights, StreamWeights


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
