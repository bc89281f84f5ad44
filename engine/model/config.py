"""Hyper-parameters of a model as frozen dataclasses, layer by layer.

Pure description: nothing here reads a file or touches an array. `engine.model.reading` fills it from metadata.
Letters used in all docstrings of this package: T tokens, D width, H heads, K key/value heads, Hd head width,
F feed-forward width, E experts, V vocabulary. A field's default is what a plain model does: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.model.indexer_config import IndexerConfig
from engine.model.ngram_config import NgramConfig
from engine.model.pooling import Pooling, RankConfig
from engine.model.recurrent_config import RecurrentConfig
from engine.model.rope_config import RopeConfig as RopeConfig
from engine.model.rope_config import RopeScaling as RopeScaling
from engine.model.rope_config import RopeStyle as RopeStyle
from engine.model.rwkv_config import ChannelMixConfig
from engine.model.skip_config import SkipConfig, most_streams
from engine.model.stream_config import AltUpConfig


class NormKind(Enum):
    """How a vector is normalized before its weight (if any) multiplies it and its bias (if any) is added."""

    RMS = "rms"  # x / sqrt(mean(x²) + ε)
    LAYER = "layer"  # (x - mean(x)) / sqrt(mean((x - mean(x))²) + ε)


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


class Activation(Enum):
    """Non-linearity f of a feed-forward part: h = f(gate) · up, or h = f(up) where it has no gate."""

    SILU = "silu"  # x · sigmoid(x)
    # The tanh approximation x/2 · (1 + tanh(sqrt(2/π) · (x + 0.044715 x³))), of x rounded to float16 and rounded to
    # float16 again while |x| < 10, and max(x, 0) beyond: what ggml computes, and so what reference logits hold. The
    # roundings matter at 1e-7 of a result's square.
    GELU = "gelu"
    RELU = "relu"  # max(x, 0)
    RELU_SQUARED = "relu_squared"  # max(x, 0)²
    # Gated only: g = min(gate, 7), u = clamp(up, -7, 7); h = g · sigmoid(1.702 g) · (u + 1).
    SWIGLU_CLAMPED = "swiglu_clamped"
    # Gated only: b · tanh(gate / b) · sigmoid(gate) · c · tanh(up / c), or · up where c is 0, with (b, c) =
    # FfnConfig.caps.
    SITU = "situ"
    # Ungated only, with (a, b, β, ε) = FfnConfig.xielu: a x² + β x above zero, else b · (exp(min(x, ε)) - 1 - x) + β x
    # (arXiv 2411.13010).
    XIELU = "xielu"


class Routing(Enum):
    """How router scores s become expert weights p, from which the best are chosen."""

    SOFTMAX = "softmax"  # softmax over all experts
    SIGMOID = "sigmoid"  # sigmoid of each score
    SOFTMAX_CHOSEN = "softmax_chosen"  # the best are chosen by s; p is the softmax over the chosen alone


class ResidualKind(Enum):
    """What the feed-forward part of a layer reads."""

    SEQUENTIAL = "sequential"  # y = x + attention(x); y + ffn(y)
    PARALLEL = "parallel"  # x + attention(x) + ffn(x)


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
    sub_norm: bool = False  # what attn_output reads is normalized by attn_sub_norm, all heads together
    cache_layer: int | None = None  # keys and values are those of this earlier layer; the layer has none of its own

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def values_in_keys(self) -> bool:
        """Whether a value is the first value_width numbers of its key, so that keys alone need to be cached."""
        return self.latent is not None and self.latent.absorbed


@dataclass(frozen=True, kw_only=True)
class FfnConfig:
    """Feed-forward part: down(activation(gate(x)) · up(x)), or down(activation(up(x))) where not gated.

    With a limit (gated parts only) down(min(activation(gate(x)), limit) · max(-limit, min(up(x), limit))); where
    limits_gate it is activation(min(gate(x), limit)) instead.
    With `sparsity` s above zero the gate g of a token becomes max(0, g - mean(g) - s · deviation(g)) before the
    activation, with the deviation of a sample (Gemma 3n).
    """

    width: int
    activation: Activation
    gated: bool = True
    limit: float | None = None
    limits_gate: bool = False
    caps: tuple[float, float] | None = None  # of Activation.SITU
    sparsity: float = 0.0
    xielu: tuple[float, float, float, float] | None = None  # of Activation.XIELU
    sub_norm: bool = False  # what down reads is normalized by ffn_sub_norm


@dataclass(frozen=True, kw_only=True)
class AdjugateConfig:
    """Small experts that groups of experts share (GroveMoE; arXiv 2508.07785).

    With y what the mixture gives, y + scale · the sum of w_g · adjugate_g(y) over the groups g of the best n_used
    experts; w are the router's p of the experts whose numbers are g, divided by their sum.
    """

    per_group: int  # consecutive experts of a group
    n_used: int
    expert: FfnConfig
    scale: float


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts: the router picks `n_used` of `n_experts` feed-forward parts per token.

    1. p = routing(router x). 2. Choice by p + selection bias (weights.selection_bias; the bias has no part in 4).
    3. With n_groups > 1 the experts are consecutive groups; a group's score is the sum of its two best choice scores,
    and only experts of the best n_groups_used groups can be chosen. 4. The chosen p are divided by their sum where
    `normalize` (not below 2^-14), and multiplied by weight_scale. 5. The sum over the chosen of
    weight · expert(x), or of expert(weight · x) where weights_inputs. 6. The shared part's output is added, times
    shared_scale and gated where shared_gate.

    With a latent_width the experts of 5. read latent_down · x and give as many numbers; of their sum s (normalized
    where the weights have a norm) latent_up · s is taken. Router and shared part read x.
    With `separate_norms` router and experts do not read the layer's ffn_norm(x), as the shared part does, but norms of
    their own, and the outputs of the experts and of the shared part are normalized before they are added (Gemma 4).
    """

    n_experts: int
    n_used: int
    expert: FfnConfig
    routing: Routing = Routing.SOFTMAX
    normalize: bool = True
    weight_scale: float = 1.0
    n_groups: int = 1
    n_groups_used: int = 1
    shared: FfnConfig | None = None  # an expert that computes every token
    shared_gate: bool = False  # its output is multiplied by sigmoid(a learned score)
    shared_scale: float = 1.0  # in the weights it is a factor of the part's down
    weights_inputs: bool = False
    routed_early: bool = False  # the router reads the layer's input, before the mixer and its norm
    adjugate: AdjugateConfig | None = None
    reads_input: bool = False  # router and experts, but not the shared part, read ffn_norm_exps(the layer's input)
    latent_width: int | None = None  # numbers that an expert reads and gives, where these are not D
    separate_norms: bool = False


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
    skip_config.py. `ngrams` are added to x before everything else.

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
