"""Steps 4 to 8 of sampling: which tokens stay, and which of them is drawn. Arrays only, no requests.

Candidates come in order: logit descending, then token id ascending. w: float32 weights in [0, 1]; q: the same as
fixed-point integers (engine/sampling/fixed_point.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.sampling.fixed_point import F32, FloatArray, WeightArray, fixed_point, share
from engine.sampling.rng import UNIFORM_BITS

Ids = NDArray[np.int64]
CHUNK = 256


def largest_ids(logits: FloatArray, k: int) -> Ids:
    """Ids of the k largest logits, in order.

    Never sorts the vocabulary: the k-th largest of the chunk maxima is a lower bound of the k-th largest logit, and
    hardly more than k logits reach it.

    Args:
        logits: (V,) float32 without NaN.
        k: 1 to V.
    """
    n_chunks = len(logits) // CHUNK
    bound = -np.inf
    if n_chunks >= k:
        maxima = logits[: n_chunks * CHUNK].reshape(n_chunks, CHUNK).max(axis=1)
        bound = np.partition(maxima, n_chunks - k)[n_chunks - k]
    elif k < len(logits):
        bound = np.partition(logits, len(logits) - k)[len(logits) - k]
    if bound == -np.inf:  # fewer than k may be drawn, as where a constraint allows few: only those are sorted
        ids = np.flatnonzero(logits > bound)
        ids = np.concatenate((ids, np.flatnonzero(logits == bound)[: max(0, k - len(ids))]))
    else:
        ids = np.flatnonzero(logits >= bound)
    return ids[np.argsort(-logits[ids], kind="stable")[:k]]


def keep_typical(x: FloatArray, w: FloatArray, q: WeightArray, ids: Ids, p: float) -> NDArray[np.bool_]:
    """Locally typical sampling (Meister et al. 2022): keep the tokens of nearly the expected surprise.

    With logits x relative to the largest, -log(prob) minus the entropy is (weighted mean of x) - x, so no logarithm is
    needed. Tokens are taken by the size of that difference, ties by lower id, until their mass reaches p.
    """
    counted = q > 0
    downward = np.where(counted, -x, F32(0.0)) * np.where(counted, w, F32(0.0))
    total = int(q.sum())
    mean = F32(-(np.float64(int(fixed_point(downward).sum())) / np.float64(total)))
    score = np.abs(x - mean)
    order = np.lexsort((ids, score))
    mass = q[order]
    before = np.cumsum(mass) - mass
    keep = np.zeros(len(ids), dtype=np.bool_)
    keep[order[before < share(p, total)]] = True
    return keep


def top_p_count(q: WeightArray, p: float, total: int) -> int:
    """Length of the shortest prefix whose mass reaches the share p of total."""
    return int(np.searchsorted(np.cumsum(q), share(p, total))) + 1


def keep_min_p(w: FloatArray, min_p: float) -> NDArray[np.bool_]:
    """Tokens at least min_p times as probable as the first (most probable) one."""
    keep: NDArray[np.bool_] = w >= w[0] * F32(min_p)
    return keep


def draw(q: WeightArray, random: int, total: int) -> int:
    """Index of the first candidate whose cumulative mass exceeds random / 2**24 of total."""
    return int(np.searchsorted(np.cumsum(q), random * total >> UNIFORM_BITS, side="right"))
