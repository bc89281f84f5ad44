"""Weights of recurrent mixers: one class per class of config/recurrent.py and config/rwkv.py."""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.weights.matrices import ExpertLinear, Float32Array, Linear, Norm


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
    (I, W), a and d (H,). As views in the order of MambaWeights: u_z, the rows of ssm_in that give u and those that give
    z; d_b_c, those of ssm_x; each_dt (I, dt_rank), ssm_dt with a row for every channel.
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
    u_z: tuple[Linear, Linear]
    d_b_c: tuple[Linear, Linear, Linear]
    each_dt: Linear

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
    | Rwkv6Weights
    | Rwkv7Weights
)
"""Weights of a recurrent mixer, one class per class of config/recurrent.py and config/rwkv.py."""
