"""Routing by the definition, in float64, and how exactly kernels must compute products of experts."""

import numpy as np

from engine.cuda.experts.router import Gating

# Two products with half operands one after the other; see test_gemm.py. The random blocks' scales are so uneven that
# a row may hang on a handful of products, whose roundings then do not average out.
TOLERANCE, WORST_ROW = 1e-6, 5e-6


def routed(routing, scores, bias=None):
    """Experts and weights of each row, by the definition, in float64."""
    scores, more = np.split(scores.astype(np.float64), [routing.n_experts], axis=1)
    if routing.gating is Gating.SOFTMAX:
        gates = np.exp(scores - scores.max(1, keepdims=True))
        gates /= gates.sum(1, keepdims=True)
    else:
        gates = scores if routing.gating is Gating.SOFTMAX_OF_CHOSEN else 1 / (1 + np.exp(-scores))
    choice = gates if bias is None else gates + bias
    if routing.groups > 1:
        grouped = choice.reshape(len(choice), routing.groups, -1)
        best = np.sort(grouped, axis=2)[:, :, -2:].sum(2)
        out = np.argsort(-best, axis=1, kind="stable")[:, routing.groups_used :]
        for row, shut in enumerate(out):
            grouped[row, shut] = -np.inf
        choice = grouped.reshape(choice.shape)
    ids = np.argsort(-choice, axis=1, kind="stable")[:, : routing.n_used]
    weights = np.take_along_axis(gates, ids, 1)
    if routing.gating is Gating.SOFTMAX_OF_CHOSEN:
        weights = np.exp(weights - weights.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
    elif routing.normalize:
        weights = weights / weights.sum(1, keepdims=True)
    shared = np.arange(routing.n_shared) + routing.n_experts
    share = 1 / (1 + np.exp(-more[:, :1])) if routing.shared_scored else np.ones((len(ids), 1))
    share = np.repeat(share * routing.shared_scale, routing.n_shared, axis=1)
    ids = np.concatenate([ids, np.tile(shared, (len(ids), 1))], axis=1)
    return ids, np.concatenate([weights * routing.weight_scale, share], axis=1)


def silu(v):
    return v / (1 + np.exp(np.minimum(-v, 700)))
