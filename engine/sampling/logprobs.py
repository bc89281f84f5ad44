"""Log-probabilities of tokens under the raw logits: log-softmax before bias, penalties and temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike

from engine.errors import ModelFileError
from engine.sampling.filters import largest_ids
from engine.sampling.fixed_point import FloatArray, exponential, fixed_point, log_of_total
from engine.sampling.result import TokenSample


def check_logits(logits: FloatArray) -> np.float32:
    """The largest of a row of logits (V,), after a check that a token can be chosen from them.

    Raises:
        ModelFileError: they hold NaN or +inf, or no finite number.
    """
    if logits.ndim != 1 or not len(logits):
        raise ValueError(f"logits of shape {logits.shape}; one row (V,) is needed")
    largest: np.float32 = logits.max()  # NaN if there is any
    if not np.isfinite(largest):
        found = "NaN" if np.isnan(largest) else "infinity" if largest > 0 else "no finite number"
        raise ModelFileError(
            f"the model's logits hold {found}: the weights are damaged or outside the float range, "
            "compare the file's checksum with its source"
        )
    return largest


def log_probabilities(logits: FloatArray, token_id: int, n_top: int) -> TokenSample:
    """Log-probability of one token and of the n_top most probable ones.

    Args:
        logits: (V,) float32.
        token_id: the token asked for.
        n_top: 0 or more.

    Raises:
        ModelFileError: see check_logits().
    """
    relative = logits - check_logits(logits)
    log_total = log_of_total(int(fixed_point(exponential(relative)).sum()))
    top = largest_ids(logits, min(n_top, len(logits))) if n_top else ()
    return TokenSample(
        token_id,
        float(relative[token_id] - log_total),
        tuple((int(i), float(relative[i] - log_total)) for i in top),
    )


def certain(token_id: int, n_top: int, vocab_size: int) -> TokenSample:
    """What log_probabilities() gives of logits that are -inf for all tokens but one."""
    others = (i for i in range(vocab_size) if i != token_id)
    top = [(token_id, 0.0), *((i, -math.inf) for i in islice(others, n_top))]
    return TokenSample(token_id, 0.0, tuple(top[:n_top]))


def score_tokens(logits: ArrayLike, token_ids: Sequence[int], n_top: int) -> list[TokenSample]:
    """Log-probabilities of known tokens, one per row: for prompts, chunk by chunk, keeping nothing of size V.

    Args:
        logits: (T, V) float32; row t predicts token_ids[t].
        token_ids: T tokens.
        n_top: most probable tokens to report per row.
    """
    rows: FloatArray = np.asarray(logits, dtype=np.float32)
    if rows.ndim != 2 or len(rows) != len(token_ids):
        raise ValueError(f"logits of shape {rows.shape} for {len(token_ids)} tokens; (T, V) is needed")
    return [log_probabilities(row, int(token_id), n_top) for row, token_id in zip(rows, token_ids, strict=True)]
