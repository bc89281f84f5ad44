"""Which experts a token chooses, and their weights, in plain numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.cpu.recurrent.tools import softplus
from engine.cpu.reference import Float32Array, sigmoid, softmax
from engine.model.config import AdjugateConfig, MoeConfig, Routing

LEAST_SUM = 2.0**-14
"""Least sum that chosen expert weights are divided by: the smallest normal float16."""


def route(
    logits: Float32Array,
    moe: MoeConfig,
    selection_bias: Float32Array | None = None,
    stated: npt.NDArray[np.int32] | None = None,
) -> tuple[npt.NDArray[np.intp], Float32Array]:
    """Choose experts.

    Args:
        logits: (T, E) router scores; overwritten.
        moe: how many, and how their weights are made.
        selection_bias: (E,) added for the choice alone, or None.
        stated: (T, n_used) experts that are not chosen by scores, or None.

    Returns:
        (T, n_used) expert numbers, best first and the lower number first among equals, and their weights.
    """
    if moe.routing is Routing.SOFTMAX:
        softmax(logits)
    elif moe.routing is Routing.SIGMOID:
        logits = sigmoid(logits)
    elif moe.routing is Routing.SQRT_SOFTPLUS:
        logits = np.sqrt(softplus(logits))
    chosen = _chosen(logits, moe, selection_bias) if stated is None else stated.astype(np.intp)
    weights = np.take_along_axis(logits, chosen, axis=-1)
    if moe.routing is Routing.SOFTMAX_CHOSEN:
        softmax(weights)
    if moe.normalize:
        weights /= np.maximum(np.add.reduce(weights, axis=-1, keepdims=True), np.float32(LEAST_SUM))
    weights *= np.float32(moe.weight_scale)
    return chosen, weights


def _chosen(probabilities: Float32Array, moe: MoeConfig, selection_bias: Float32Array | None) -> npt.NDArray[np.intp]:
    """The numbers (T, n_used) of the best experts."""
    choice = probabilities if selection_bias is None else probabilities + selection_bias
    if moe.n_groups > 1:
        choice = _best_groups(choice, moe)
    return np.argsort(-choice, axis=-1, kind="stable")[:, : moe.n_used]


def adjugate_groups(
    logits: Float32Array, chosen: npt.NDArray[np.intp], config: AdjugateConfig
) -> tuple[npt.NDArray[np.intp], Float32Array]:
    """The groups of the best experts, (T, n_used) numbers, and the weights of their adjugate experts.

    Args:
        logits: (T, E) router scores; overwritten.
        chosen: (T, experts used) expert numbers, best first.
        config: how many, and of how many experts each.
    """
    softmax(logits)
    groups = chosen[:, : config.n_used] // config.per_group
    weights = np.take_along_axis(logits, groups, axis=-1)
    weights /= np.maximum(np.add.reduce(weights, axis=-1, keepdims=True), np.float32(LEAST_SUM))
    weights *= np.float32(config.scale)
    return groups, weights


def _best_groups(choice: Float32Array, moe: MoeConfig) -> Float32Array:
    """The choice scores with those outside the best groups of each token at minus infinity."""
    groups = choice.reshape(len(choice), moe.n_groups, -1)
    scores = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
    best = np.argsort(-scores, axis=-1, kind="stable")[:, : moe.n_groups_used]
    allowed = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(allowed, best, True, axis=-1)
    return np.where(allowed[..., None], groups, np.float32(-np.inf)).reshape(choice.shape)
