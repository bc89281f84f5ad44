"""Weights of feed-forward parts and of mixtures of experts, in terms of FfnConfig and MoeConfig."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.model.weights.matrices import ExpertLinear, Float32Array, Linear, Norm


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

    selection_bias (E,) float32 joins the choice of experts only. token_experts (V, experts used) are those of each
    token, in layers with MoeConfig.by_token. norm is that of MoeConfig.reads_input, or with
    separate_norms that of the experts; only then there are router_norm, expert_post_norm and shared_post_norm, of what
    router, experts and shared part read or give.
    """

    router: Linear
    shared: FfnWeights | None
    shared_gate: Linear | None
    selection_bias: Float32Array | None = None
    token_experts: npt.NDArray[np.int32] | None = None
    norm: Norm | None = None
    adjugate: ExpertsWeights | None = None
    latent: LatentExpertWeights | None = None
    router_norm: Norm | None = None
    expert_post_norm: Norm | None = None
    shared_post_norm: Norm | None = None
