"""Weights of what layers do with the residual stream beside their parts."""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.weights.matrices import ExpertLinear, Float32Array, Linear, Norm, Weight


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
