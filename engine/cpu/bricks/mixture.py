"""Mixtures of experts on the CPU: what MoeConfig says between the norm before them and the one behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.cpu.bricks.routing import adjugate_groups, route
from engine.cpu.reference import Float32Array, sigmoid
from engine.model.config import FfnConfig, MoeConfig
from engine.model.weights import ExpertsWeights, FfnWeights, Linear, MoeWeights, Norm


@dataclass(frozen=True)
class Bricks:
    """What a mixture needs of the forward pass.

    Attributes:
        linear: a projection of (T, M), in an array of the caller's own.
        normalize: a norm over the last axis; None leaves the array as it is.
        gate_up: the hidden values (T, F) of a feed-forward part.
    """

    linear: Callable[[Linear, Float32Array], Float32Array]
    normalize: Callable[[Float32Array, Norm | None], Float32Array]
    gate_up: Callable[[FfnWeights, FfnConfig, Float32Array], Float32Array]


def mix_experts(
    moe: MoeWeights,
    config: MoeConfig,
    bricks: Bricks,
    normed: Float32Array,
    read: Float32Array,
    scores: Float32Array,
    token_ids: npt.NDArray[np.int32],
) -> Float32Array:
    """The sum (T, D) of the chosen experts and the shared one.

    Args:
        moe: the weights.
        config: the mixture.
        bricks: of the forward pass.
        normed: (T, D), what the shared expert reads.
        read: (T, D), what the experts read.
        scores: (T, E) of the router; overwritten.
        token_ids: (T,).
    """
    linear, normalize = bricks.linear, bricks.normalize
    probabilities = scores.copy() if config.adjugate is not None else scores
    stated = None if moe.token_experts is None else moe.token_experts[token_ids]
    chosen, weights = route(scores, config, moe.selection_bias, stated)
    routed = read if moe.latent is None else linear(moe.latent.down, read)
    out = _chosen(moe, config.expert, bricks, routed, chosen, weights, on_inputs=config.weights_inputs)
    if moe.adjugate is not None and config.adjugate is not None:
        groups, weights = adjugate_groups(probabilities, chosen, config.adjugate)
        given = out.copy()
        for place in range(groups.shape[1]):  # one by one, as two may be the same
            one = groups[:, place, None], weights[:, place, None]
            out += _chosen(moe.adjugate, config.adjugate.expert, bricks, given, *one)
    if moe.latent is not None:
        out = linear(moe.latent.up, normalize(out, moe.latent.norm))
    out = normalize(out, moe.expert_post_norm)
    if moe.shared is not None and config.shared is not None:
        shared = linear(moe.shared.down, bricks.gate_up(moe.shared, config.shared, normed))
        if moe.shared_gate is not None:
            shared *= sigmoid(linear(moe.shared_gate, normed))
        out += normalize(shared, moe.shared_post_norm)
    return out


def _chosen(
    experts: ExpertsWeights,
    config: FfnConfig,
    bricks: Bricks,
    x: Float32Array,
    chosen: npt.NDArray[np.intp],
    weights: Float32Array,
    *,
    on_inputs: bool = False,
) -> Float32Array:
    """The weighted sum (T, D) of the experts that rows of x (T, D) chose, both (T, n)."""
    out = np.zeros_like(x)
    # Expert by expert in ascending order, so that each expert's weights are read once and a token's sum does not
    # depend on what else is in the batch.
    for expert in np.unique(chosen):
        rows, place = np.nonzero(chosen == expert)
        parts, inputs, weight = experts.expert(expert), x[rows], weights[rows, place, None]
        if on_inputs:
            inputs *= weight
        part = bricks.linear(parts.down, bricks.gate_up(parts, config, inputs))
        out[rows] += part if on_inputs else part * weight
    return out
