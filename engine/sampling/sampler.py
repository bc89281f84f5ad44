"""Chooses the next token from one row of logits. engine/cuda/sampling/sampling.cu takes the same steps.

The order of the steps:

0. the constraint's mask: tokens that it does not allow get the logit -inf
1. logit bias
2. repetition, then frequency and presence penalties
3. temperature; 0 ends here with the largest logit
4. top-k
5. typical
6. top-p
7. min-p
8. draw

Candidates are ranked by the logit after step 2 (temperature cannot change that order), ties by lower token id. The
result depends on the logits, the settings, the history, the seed and the output index alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from engine.errors import InvalidRequestError
from engine.sampling.constraint import Bits
from engine.sampling.filters import Ids, draw, keep_min_p, keep_typical, largest_ids, top_p_count
from engine.sampling.fixed_point import F32, FloatArray, WeightArray, distances, exponential, fixed_point, share
from engine.sampling.logprobs import check_logits, log_probabilities
from engine.sampling.params import SamplingParams
from engine.sampling.penalties import add_bias, penalize, window_of
from engine.sampling.result import TokenSample
from engine.sampling.rng import UNIFORM_BITS, uniform24

FIRST_PREFIX = 1024


def sample(
    logits: ArrayLike,
    params: SamplingParams,
    *,
    history: Sequence[int],
    output_index: int,
    seed: int,
    allowed: Bits | None = None,
) -> TokenSample:
    """Choose one token.

    Args:
        logits: (V,) float32; not changed.
        params: the settings.
        history: prompt and output so far, oldest first.
        output_index: number of tokens generated before this one.
        seed: key of the random numbers, 0 to 2**64 - 1.
        allowed: the tokens that may be drawn, a bit each; None: all.

    Returns:
        The token, with log-probabilities of the raw logits if params.logprobs asks for them; where there is a mask, of
        the masked ones unless params.free_logprobs.

    Raises:
        ModelFileError: the logits hold NaN or +inf, or no finite number.
        InvalidRequestError: a logit_bias id is outside the vocabulary, or the bias leaves no token.
    """
    raw: FloatArray = np.asarray(logits, dtype=np.float32)
    check_logits(raw)
    masked = raw if allowed is None else mask_logits(raw, allowed)
    token_id = choose(adjusted(masked, params, history), params, output_index, seed)
    if params.logprobs is None:
        return TokenSample(token_id)
    return log_probabilities(raw if params.free_logprobs else masked, token_id, params.logprobs)


def mask_logits(logits: FloatArray, allowed: Bits) -> FloatArray:
    """Step 0: a copy of logits (V,) with -inf for the tokens that are not allowed.

    Raises:
        InvalidRequestError: all tokens that are allowed have the logit -inf.
    """
    bits = np.unpackbits(allowed.view(np.uint8), count=len(logits), bitorder="little").view(np.bool_)
    masked: FloatArray = np.full(len(logits), -np.inf, np.float32)
    np.copyto(masked, logits, where=bits)  # mostly few tokens are allowed, or nearly all
    if not np.isfinite(masked.max()):
        raise InvalidRequestError("the model gives no probability to any token that the constraint allows")
    return masked


def adjusted(logits: FloatArray, params: SamplingParams, history: Sequence[int]) -> FloatArray:
    """Steps 1 and 2: the same array where nothing is to be done, else a changed copy.

    Raises:
        InvalidRequestError: see sample().
    """
    recent = window_of(history, params.penalty_last_n) if params.penalizes else ()
    if not params.logit_bias and not len(recent):
        return logits
    logits = logits.copy()
    if params.logit_bias:
        params.check_vocabulary(len(logits))
        add_bias(logits, params.logit_bias)
    if len(recent):
        penalize(
            logits,
            recent,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
        )
    if not np.isfinite(logits.max()):
        raise InvalidRequestError("logit_bias and the penalties leave no token with a finite logit; forbid fewer")
    return logits


def choose(logits: FloatArray, params: SamplingParams, output_index: int, seed: int) -> int:
    """Steps 3 to 8 on logits (V,) with a finite maximum."""
    if params.greedy or params.top_k == 1:
        return int(logits.argmax())
    random = uniform24(seed, output_index)
    if 0 < params.top_k < len(logits):
        ids = largest_ids(logits, params.top_k)
        return _choose_ordered(logits[ids], ids, params, random)
    if F32(params.typical_p) < 1:
        ids = largest_ids(logits, len(logits))
        return _choose_ordered(logits[ids], ids, params, random)
    return _choose_from_all(logits, params, random)


def _weigh(logits: FloatArray, largest: np.float32, temperature: float) -> tuple[FloatArray, FloatArray, WeightArray]:
    x = distances(logits, largest, temperature)
    w = exponential(x)
    return x, w, fixed_point(w)


def _choose_ordered(logits: FloatArray, ids: Ids, params: SamplingParams, random: int) -> int:
    """Steps 5 to 8 on candidates in order."""
    x, w, q = _weigh(logits, logits[0], params.temperature)
    if F32(params.typical_p) < 1:
        keep = keep_typical(x, w, q, ids, params.typical_p)
        ids, w, q = ids[keep], w[keep], q[keep]
    if F32(params.top_p) < 1:
        n = top_p_count(q, params.top_p, int(q.sum()))
        ids, w, q = ids[:n], w[:n], q[:n]
    if params.min_p > 0:
        keep = keep_min_p(w, params.min_p)
        ids, q = ids[keep], q[keep]
    return int(ids[draw(q, random, int(q.sum()))])


def _choose_from_all(logits: FloatArray, params: SamplingParams, random: int) -> int:
    """Steps 6 to 8 on the whole vocabulary, ordering only as long a prefix as the result needs."""
    _, w, q = _weigh(logits, logits.max(), params.temperature)
    if F32(params.top_p) < 1:
        needed = share(params.top_p, int(q.sum()))
        total = 0
    else:
        total = int(q[w >= F32(params.min_p)].sum())  # the largest weight is 1
        needed = (random * total >> UNIFORM_BITS) + 1
    n = min(FIRST_PREFIX, len(logits))
    while True:
        ids = largest_ids(logits, n)
        mass = q[ids]
        if n == len(logits) or int(mass.sum()) >= needed:
            break
        n = min(8 * n, len(logits))
    if not total:
        n = int(np.searchsorted(np.cumsum(mass), needed)) + 1
        ids, mass = ids[:n], mass[:n]
        if params.min_p > 0:
            mass = mass[keep_min_p(w[ids], params.min_p)]
        total = int(mass.sum())
    return int(ids[draw(mass, random, total)])
