"""Weights as the file stores them: packed, mapped views, and the small vectors beside them as float32.

Nothing here expands a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.config import LayerConfig, ResidualKind
from engine.model.indexer_weights import IndexerWeights
from engine.model.matrices import ExpertLinear as ExpertLinear
from engine.model.matrices import Float32Array as Float32Array
from engine.model.matrices import Linear as Linear
from engine.model.matrices import Norm as Norm
from engine.model.matrices import Weight as Weight
from engine.model.rope import RopeTable
from engine.model.skip_weights import SkipWeights


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
    sinks and alibi_slopes are float32 (H,) or None. gate is that of OutputGate.OWN, (H · Hv, D), or PER_HEAD, (H, D);
    with IN_QUERY q has 2 · H · Hd rows. Where `latent` is set q, k and v are None, and output is
    (D, H · LatentConfig.value_width).
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
    indexer: IndexerWeights | None = None

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
class LatentExpertWeights:
    """Weights of MoeConfig.latent, L numbers: down (L, D), up (D, L), and a norm of L numbers or None."""

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

    selection_bias (E,) float32 joins the choice of experts only. norm is that of MoeConfig.reads_input.
    """

    router: Linear
    shared: FfnWeights | None
    shared_gate: Linear | None
    selection_bias: Float32Array | None = None
    norm: Norm | None = None
    adjugate: ExpertsWeights | None = None
    latent: LatentExpertWeights | None = None


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
    Where decay_b or gate_b is None, the first of the two is (H · S, D).
    float32: conv1d (3 · H · S, W) of q, k and v, dt_bias (H · S,), a (H,); norm's weight is (S,).
    """

    q: Linear
    k: Linear
    v: Linear
    beta: Linear
    decay_a: Linear
    decay_b: Linear | None
    gate_a: Linear
    gate_b: Linear | None
    conv1d: Float32Array
    dt_bias: Float32Array
    a: Float32Array
    norm: Norm
    output: Linear

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        low_rank = (linear for linear in (self.decay_a, self.decay_b, self.gate_a, self.gate_b) if linear is not None)
        return self.q, self.k, self.v, self.beta, *low_rank, self.output


@dataclass(frozen=True, eq=False)
class LightningWeights:
    """Weights of LightningConfig: qkv (3 · H · S, D), gate (H · S, D), output (D, H · S), decay (H,) float32."""

    qkv: Linear
    gate: Linear
    norm: Norm
    output: Linear
    decay: Float32Array

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return self.qkv, self.gate, self.output


@dataclass(frozen=True, eq=False)
class Plamo2Weights:
    """Weights of Plamo2Config.

    ssm_in (2 · I, D), ssm_x (2 · S + dt_rank, I), ssm_dt (H, dt_rank) with its bias, ssm_out (D, I). float32: conv1d
    (I, W), a and d (H,).
    """

    ssm_in: Linear
    conv1d: Float32Array
    ssm_x: Linear
    ssm_dt: Linear
    a: Float32Array
    d: Float32Array
    b_norm: Norm
    c_norm: Norm
    dt_norm: Norm
    ssm_out: Linear

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return self.ssm_in, self.ssm_x, self.ssm_dt, self.ssm_out


RecurrentWeights = (
    MambaWeights
    | ShortConvWeights
    | Mamba2Weights
    | DeltaNetWeights
    | KimiDeltaWeights
    | LightningWeights
    | Plamo2Weights
)
"""Weights of a recurrent mixer, one class per class of engine.model.recurrent_config."""


@dataclass(frozen=True, eq=False)
class CombinedWeights:
    """Weights of CombinedConfig."""

    attention: AttentionWeights
    recurrent: RecurrentWeights


MixerWeights = AttentionWeights | RecurrentWeights | CombinedWeights
"""Weights of a layer's mixer, one class per class of engine.model.config.MixerConfig."""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer's constants and weights; at most one of `ffn` and `moe` is set. A norm that is None does nothing.

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
    mixer_skip: SkipWeights | None = None
    ffn_skip: SkipWeights | None = None
    embedding_scale: float = 0.0
    closing_norm: Norm | None = None

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
class ModelWeights:
    """The whole model: token_embd (V, D), output (V, D); `tied` says that the two are one tensor.

    position_embd (context, D) has learned positions or is None. head_skip is that of the
    head, where residual connections are more than a sum.
    """

    token_embd: Weight
    layers: tuple[LayerWeights, ...]
    output_norm: Norm | None
    output: Linear
    tied: bool
    embedding_norm: Norm | None = None
    position_embd: Weight | None = None
    head_skip: SkipWeights | None = None
