"""Weights of RWKV's time mixing and channel mixing (engine.model.rwkv_config).

Packed matrices and small vectors, as in engine/model/weights.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.matrices import ExpertLinear, Float32Array, Linear, Norm


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
