"""Hyper-parameters of a whole model, and the order of the parts of a layer.

Here parts are put together; what one of them computes is in the file of that part.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.model.config.attention import AttentionConfig
from engine.model.config.ffn import FfnConfig, MoeConfig
from engine.model.config.ngrams import NgramConfig
from engine.model.config.pooling import Pooling, RankConfig
from engine.model.config.recurrent import RecurrentConfig
from engine.model.config.rwkv import ChannelMixConfig
from engine.model.config.skips import SkipConfig, most_streams
from engine.model.config.streams import AltUpConfig


class NormKind(Enum):
    """How a vector is normalized before its weight (if any) multiplies it and its bias (if any) is added."""

    RMS = "rms"  # x / sqrt(mean(x²) + ε)
    LAYER = "layer"  # (x - mean(x)) / sqrt(mean((x - mean(x))²) + ε)


class ResidualKind(Enum):
    """What the feed-forward part of a layer reads."""

    SEQUENTIAL = "sequential"  # y = x + attention(x); y + ffn(y)
    PARALLEL = "parallel"  # x + attention(x) + ffn(x)


@dataclass(frozen=True, kw_only=True)
class CombinedConfig:
    """Attention and a recurrent mixer that read the same normalized input; what they give is added (Falcon-H1)."""

    attention: AttentionConfig
    recurrent: RecurrentConfig


MixerConfig = AttentionConfig | RecurrentConfig | CombinedConfig
"""The part of a layer that reads other tokens of the sequence; one class per kind."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer.

    With r = residual_scale and norms that LayerWeights may lack (None = identity):
    y = x + r · attn_post_norm(mixer(attn_norm(x))); result y + r · ffn_post_norm(ffn(ffn_norm(y))), where a
    parallel layer reads ffn(ffn_norm(x)) instead. Without a mixer y = x; without a feed-forward part the result is y.
    With output_norms attn_output_norm(y) takes the place of y, then, where the layer has it, attn_norm_2(y + x), and
    layer_output_norm(result) that of the result.
    With an embedding_skip layer_output_scale · (what ModelConfig says the first layer reads) is added to the result,
    and with a closing_norm the result is normalized as the last layer's is. Other residual connections: see
    skips.py. `ngrams` are added to x before everything else.

    With a `laurel_rank`, y = (y + n + laurel_norm(laurel_r · laurel_l · n)) / sqrt(2) for n = attn_norm(x). With a
    `per_layer_width` the result z gets + post_norm(proj · (gelu(inp_gate · z) · e)), where e is the layer's own vector
    of the token (see ModelConfig). Then it is multiplied by output_scale and by output_factor. `streams`: AltUpConfig.
    """

    index: int
    mixer: MixerConfig | None
    ffn: FfnConfig | MoeConfig | ChannelMixConfig | None
    residual: ResidualKind = ResidualKind.SEQUENTIAL
    residual_scale: float = 1.0
    output_norms: bool = False
    block: int | None = None  # its number in the file, whose layers may be passed several times; None = index
    embedding_skip: bool = False
    closing_norm: bool = False
    laurel_rank: int = 0
    per_layer_width: int = 0
    output_scale: bool = False  # a learned number, layer_output_scale
    output_factor: float = 1.0
    streams: AltUpConfig | None = None
    ngrams: NgramConfig | None = None

    @property
    def attention_part(self) -> AttentionConfig | None:
        """The layer's attention; None where it has none."""
        if isinstance(self.mixer, CombinedConfig):
            return self.mixer.attention
        return self.mixer if isinstance(self.mixer, AttentionConfig) else None

    @property
    def recurrent_part(self) -> RecurrentConfig | None:
        """The layer's recurrent mixer; None where it has none."""
        if isinstance(self.mixer, CombinedConfig):
            return self.mixer.recurrent
        return self.mixer if isinstance(self.mixer, RecurrentConfig) else None

    @property
    def attention(self) -> AttentionConfig:
        """The attention of a layer that has it; an assertion fails for others."""
        attention = self.attention_part
        assert attention is not None
        return attention

    @property
    def ffn_parts(self) -> tuple[FfnConfig, ...]:
        """The kinds of feed-forward parts in the layer: its own, or those of an expert and of the shared one."""
        if isinstance(self.ffn, MoeConfig):
            return (self.ffn.expert,) if self.ffn.shared is None else (self.ffn.expert, self.ffn.shared)
        return (self.ffn,) if isinstance(self.ffn, FfnConfig) else ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything about a model that is not a weight.

    x = embedding_norm(embedding_scale · token_embd[token] + token_types[0] + position_embd[position]), layers, then the
    logits softcap(logit_scale · (output · output_norm(x) + bias)), softcap(s) = c · tanh(s / c). Logits of the `silent`
    tokens are the least float32. An embedding is dense_3 · dense_2 · pooling(output_norm(x)).

    With a `per_layer_width` P every layer gets a vector of P numbers of the token: its part of
    (sqrt(P) · per_layer_token_embd[token] + per_layer_proj_norm(per_layer_model_proj · x / sqrt(D))) / sqrt(2).
    """

    architecture: str
    name: str
    width: int
    vocab_size: int
    context_length: int  # trained; the limit of a run is a run-time setting
    norm: NormKind
    norm_epsilon: float
    layers: tuple[LayerConfig, ...]
    embedding_scale: float = 1.0
    learned_positions: bool = False  # position_embd has context_length rows; no position beyond them exists
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    generates: bool = True  # it predicts tokens; otherwise it makes embeddings alone
    token_types: bool = False  # token_types[0] is added to every token's vector
    pooling: Pooling | None = None  # what the file asks for; None = it does not say
    rank: RankConfig | None = None
    silent: tuple[int, int] | None = None  # the first, and the one behind the last
    norms_behind: bool = False  # attn_norm and ffn_norm of every layer come after the parts
    skip: SkipConfig | None = None  # residual connections that are more than a sum
    next_token_layers: int = 0  # the last ones in the file; they predict later tokens and take no part
    per_layer_width: int = 0
    streams: AltUpConfig | None = None

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def causal(self) -> bool:
        """Whether no token sees later ones of its text, so that a text can be read piece by piece."""
        return all(layer.attention_part is None or layer.attention_part.causal for layer in self.layers)

    @property
    def stream_width(self) -> int:
        """Numbers of a token between layers, at most."""
        streams = most_streams(self.skip, self.n_layers) if self.streams is None else self.streams.count
        return self.width * streams

    @property
    def state_bytes(self) -> int:
        """Bytes of the states that one sequence keeps, over all layers; 0 without recurrent layers."""
        parts = [part for layer in self.layers for part in (layer.recurrent_part, layer.ngrams) if part is not None]
        return sum(part.state_bytes for part in parts)

    @property
    def memories(self) -> tuple[MixerConfig | None, ...]:
        """What has a cache: the mixer of each layer, then tables of n-grams."""
        tables = (layer.ngrams for layer in self.layers if layer.ngrams is not None)
        return (*(layer.mixer for layer in self.layers), *tables)
