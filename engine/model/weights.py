"""Weights as the file stores them: packed, mapped views, and the small vectors beside them as float32.

Nothing here expands a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.gguf.quants import GGMLType
from engine.model.config import LayerConfig, NormKind, ResidualKind
from engine.model.rope import RopeTable

Float32Array = npt.NDArray[np.float32]
Uint8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix (rows, columns), or a stack of them (E, rows, columns), packed in blocks along the columns.

    Attributes:
        name: the tensor's name in the file (a slice keeps it and appends its range).
        type: block format of every row.
        shape: in elements, outermost first.
        raw: uint8 (..., rows, bytes per row), read-only view of the mapped file.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    raw: Uint8Array

    @property
    def rows(self) -> int:
        """Rows of one matrix: outputs of the product."""
        return self.shape[-2]

    @property
    def columns(self) -> int:
        """Columns of one matrix: inputs of the product."""
        return self.shape[-1]

    @property
    def n_bytes(self) -> int:
        """Packed size."""
        return self.raw.nbytes

    def slice_rows(self, start: int, stop: int) -> Weight:
        """Rows start:stop of a matrix, or of every matrix of a stack, as a view."""
        shape = (*self.shape[:-2], stop - start, self.columns)
        return Weight(f"{self.name}[{start}:{stop}]", self.type, shape, self.raw[..., start:stop, :])

    def expert(self, index: int) -> Weight:
        """One matrix of a stack, as a view."""
        assert len(self.shape) == 3
        return Weight(f"{self.name}[{index}]", self.type, self.shape[1:], self.raw[index])


@dataclass(frozen=True, eq=False)
class Linear:
    """y = scale · (W x) + bias; W is (N, M), bias (N,) float32 or None."""

    weight: Weight
    bias: Float32Array | None = None
    scale: float = 1.0

    def slice_rows(self, start: int, stop: int) -> Linear:
        """The projection to outputs start:stop, as a view."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Linear(self.weight.slice_rows(start, stop), bias, self.scale)


@dataclass(frozen=True, eq=False)
class ExpertLinear:
    """E projections in one stack: yₑ = scaleₑ · (Wₑ x) + biasₑ; W (E, N, M), scale (E,), bias (E, N) or None."""

    weight: Weight
    bias: Float32Array | None = None
    scale: Float32Array | None = None

    def __post_init__(self) -> None:
        # Views are made once: a decode step asks for several of them per layer.
        linears = []
        for index in range(self.weight.shape[0]):
            bias = None if self.bias is None else self.bias[index]
            scale = 1.0 if self.scale is None else float(self.scale[index])
            linears.append(Linear(self.weight.expert(index), bias, scale))
        object.__setattr__(self, "_linears", tuple(linears))

    def slice_rows(self, start: int, stop: int) -> ExpertLinear:
        """The projections to outputs start:stop of every expert, as a view."""
        bias = None if self.bias is None else self.bias[:, start:stop]
        return ExpertLinear(self.weight.slice_rows(start, stop), bias, self.scale)

    def expert(self, index: int) -> Linear:
        """The projection of one expert."""
        linears: tuple[Linear, ...] = self._linears  # type: ignore[attr-defined]
        return linears[index]


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalization of the last axis, then its weight and bias, float32 (D,) or None for none.

    Weight and bias (heads, Hd) act on x (T, heads, Hd): every head has its own.
    """

    kind: NormKind
    epsilon: float
    weight: Float32Array | None
    bias: Float32Array | None = None


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


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """q (H·Hd, D), k (K·Hd, D), v (K·Hv, D), output (D, H·Hv).

    q, k and v may be row ranges of one tensor. Norms are as AttentionConfig.qk_norm says; v is never normalized.
    sinks and alibi_slopes are float32 (H,) or None. gate (H · Hv, D) is that of OutputGate.OWN; with IN_QUERY q
    has 2 · H · Hd rows. Where `latent` is set q, k and v are None, and output is
    (D, H · LatentConfig.value_width). With AttentionConfig.cache_layer k and v are None. v_norm has no weight.
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
    v_norm: Norm | None = None

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


@dataclass(frozen=True, eq=False)
class MoeWeights:
    """router (E, D); gate and up (E, F, D), down (E, D, F); a shared expert and its gate (1, D), or None.

    gate and up may be row ranges of one stack; gate is None where experts have none. selection_bias (E,) float32 joins
    the choice of experts only. The norms are None but with MoeConfig.separate_norms: router_norm and expert_norm of
    what router and experts read, expert_post_norm and shared_post_norm of what experts and shared part give.
    """

    router: Linear
    gate: ExpertLinear | None
    up: ExpertLinear
    down: ExpertLinear
    shared: FfnWeights | None
    shared_gate: Linear | None
    selection_bias: Float32Array | None = None
    router_norm: Norm | None = None
    expert_norm: Norm | None = None
    expert_post_norm: Norm | None = None
    shared_post_norm: Norm | None = None

    def expert(self, index: int) -> FfnWeights:
        """The feed-forward part of one expert."""
        gate = None if self.gate is None else self.gate.expert(index)
        return FfnWeights(gate, self.up.expert(index), self.down.expert(index))


@dataclass(frozen=True, eq=False)
class MambaWeights:
    """Weights of MambaConfig.

    ssm_in (2 · I, D), ssm_x (dt_rank + 2 · S, I), ssm_dt (I, dt_rank) with its bias, ssm_out (D, I). float32: conv1d
    (I, W), conv1d_bias (I,), a (I, S), d (I,). The three norms are None where the parts are not normalized.
    """

    ssm_in: Linear
    conv1d: Float32Array
    conv1d_bias: Float32Array
    ssm_x: Linear
    ssm_dt: Linear
    a: Float32Array
    d: Float32Array
    ssm_out: Linear
    dt_norm: Norm | None = None
    b_norm: Norm | None = None
    c_norm: Norm | None = None

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return self.ssm_in, self.ssm_x, self.ssm_dt, self.ssm_out


@dataclass(frozen=True, eq=False)
class ShortConvWeights:
    """Weights of ShortConvConfig: in_proj (3 · D, D), out_proj (D, D), conv (D, W) float32."""

    in_proj: Linear
    conv: Float32Array
    out_proj: Linear

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return self.in_proj, self.out_proj


@dataclass(frozen=True, eq=False)
class Mamba2Weights:
    """Weights of Mamba2Config.

    ssm_in (2 · I + 2 · G · S + H, D), ssm_out (D, I). float32: conv1d (I + 2 · G · S, W) with a bias or None, dt_bias,
    a and d (H,); norm's weight is (G, I / G).
    """

    ssm_in: Linear
    conv1d: Float32Array
    conv1d_bias: Float32Array | None
    dt_bias: Float32Array
    a: Float32Array
    d: Float32Array
    norm: Norm | None
    ssm_out: Linear

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return self.ssm_in, self.ssm_out


@dataclass(frozen=True, eq=False)
class DeltaNetWeights:
    """Weights of DeltaNetConfig.

    qkv (2 · G · S + H · S, D), z (H · S, D), beta and alpha (H, D), ssm_out (D, H · S). float32: conv1d (channels, W),
    dt_bias and a (H,); norm's weight is (S,).
    """

    qkv: Linear
    z: Linear
    beta: Linear
    alpha: Linear
    conv1d: Float32Array
    dt_bias: Float32Array
    a: Float32Array
    norm: Norm
    ssm_out: Linear

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return self.qkv, self.z, self.beta, self.alpha, self.ssm_out


@dataclass(frozen=True, eq=False)
class KimiDeltaWeights:
    """Weights of KimiDeltaConfig.

    q, k and v (H · S, D), beta (H, D), decay_a and gate_a (S, D), decay_b and gate_b (H · S, S), output (D, H · S).
    float32: conv1d (3 · H · S, W) of q, k and v, dt_bias (H · S,), a (H,); norm's weight is (S,).
    """

    q: Linear
    k: Linear
    v: Linear
    beta: Linear
    decay_a: Linear
    decay_b: Linear
    gate_a: Linear
    gate_b: Linear
    conv1d: Float32Array
    dt_bias: Float32Array
    a: Float32Array
    norm: Norm
    output: Linear

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        decays = self.decay_a, self.decay_b
        return self.q, self.k, self.v, self.beta, *decays, self.gate_a, self.gate_b, self.output


@dataclass(frozen=True, eq=False)
class LowRank:
    """b · f(a · x): a (rank, D), b (D, rank), whose bias is the file's offset; f is told where it is used."""

    a: Linear
    b: Linear


@dataclass(frozen=True, eq=False)
class Rwkv6Weights:
    """Weights of Rwkv6Config.

    mix_a (5 · mix_rank, D), mix_b (5, D, mix_rank), receptance, gate and output (D, D), key and value
    (kv_heads · S, D). float32: lerp_x (D,), lerp (5, D), first (H, S) or None. norm's weight is (H, S), where there is
    one.
    """

    lerp_x: Float32Array
    lerp: Float32Array
    mix_a: Linear
    mix_b: ExpertLinear
    decay: LowRank
    first: Float32Array | None
    receptance: Linear
    key: Linear
    value: Linear
    gate: Linear
    output: Linear
    norm: Norm | None

    def linears(self) -> tuple[Linear | ExpertLinear, ...]:
        """All projections."""
        low = self.mix_a, self.mix_b, self.decay.a, self.decay.b
        return *low, self.receptance, self.key, self.value, self.gate, self.output


@dataclass(frozen=True, eq=False)
class Rwkv7Weights:
    """Weights of Rwkv7Config.

    receptance, key, value and output (D, D). float32: lerp (6 or 5, D), k_k and k_a (D,), r_k (H, S). norm's weight is
    (H, S), or there is none. first_value is None in the first layer, and gate where there is none.
    """

    lerp: Float32Array
    receptance: Linear
    key: Linear
    value: Linear
    decay: LowRank
    rate: LowRank
    first_value: LowRank | None
    gate: LowRank | None
    k_k: Float32Array
    k_a: Float32Array
    r_k: Float32Array
    norm: Norm | None
    output: Linear

    def linears(self) -> tuple[Linear | ExpertLinear, ...]:
        """All projections."""
        low = [part for part in (self.decay, self.rate, self.first_value, self.gate) if part is not None]
        whole = self.receptance, self.key, self.value, self.output
        return *whole, *(part.a for part in low), *(part.b for part in low)


@dataclass(frozen=True, eq=False)
class ChannelMixWeights:
    """Weights of ChannelMixConfig: key (F, D), value (D, F), receptance (D, D) or None; lerps (D,) float32."""

    lerp_k: Float32Array
    key: Linear
    value: Linear
    lerp_r: Float32Array | None
    receptance: Linear | None


RecurrentWeights = (
    MambaWeights | ShortConvWeights | Mamba2Weights | DeltaNetWeights | KimiDeltaWeights | Rwkv6Weights | Rwkv7Weights
)
"""Weights of a recurrent mixer, one class per class of engine.model.recurrent_config and rwkv_config."""


@dataclass(frozen=True, eq=False)
class CombinedWeights:
    """Weights of CombinedConfig."""

    attention: AttentionWeights
    recurrent: RecurrentWeights


MixerWeights = AttentionWeights | RecurrentWeights | CombinedWeights
"""Weights of a layer's mixer, one class per class of engine.model.config.MixerConfig."""


@dataclass(frozen=True, eq=False)
class LaurelWeights:
    """Weights of LayerConfig.laurel_rank: left (rank, D), right (D, rank)."""

    left: Linear
    right: Linear
    post_norm: Norm


@dataclass(frozen=True, eq=False)
class LayerInputWeights:
    """Weights of LayerConfig.per_layer_width P: inp_gate (P, D), proj (D, P)."""

    inp_gate: Linear
    proj: Linear
    post_norm: Norm


@dataclass(frozen=True, eq=False)
class StreamWeights:
    """A layer's weights of AltUpConfig: router (A, D), predict (A · A, A), correct (A, A); scale (D,) float32."""

    router: Linear
    router_norm: Norm
    predict: Linear
    correct: Linear
    scale: Float32Array


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer's constants and weights; at most one of `ffn`, `moe` and `channel_mix` is set.

    A norm that is None does nothing. What LayerConfig says that a layer lacks is None, and output_scale 1.
    """

    config: LayerConfig
    attn_norm: Norm | None
    mixer: MixerWeights | None
    ffn_norm: Norm | None
    ffn: FfnWeights | None
    moe: MoeWeights | None
    attn_post_norm: Norm | None = None
    ffn_post_norm: Norm | None = None
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
class PerLayerWeights:
    """Weights of ModelConfig.per_layer_width P, layer by layer: token_embd (V, L · P), model_proj (L · P, D)."""

    token_embd: Weight
    model_proj: Linear
    proj_norm: Norm


@dataclass(frozen=True, eq=False)
class SpreadWeights:
    """The model's weights of AltUpConfig: proj and unembd_proj (A - 1, D, D)."""

    proj: ExpertLinear
    unembd_proj: ExpertLinear


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """The whole model: token_embd (V, D), output (V, D); `tied` says that the two are one tensor.

    position_embd (context, D) has learned positions or is None. What ModelConfig says that a model lacks is None.
    """

    token_embd: Weight
    layers: tuple[LayerWeights, ...]
    output_norm: Norm
    output: Linear
    tied: bool
    embedding_norm: Norm | None = None
    position_embd: Weight | None = None
    per_layer: PerLayerWeights | None = None
    spread: SpreadWeights | None = None
