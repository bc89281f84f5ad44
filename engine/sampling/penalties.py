"""Steps 1 and 2 of sampling: what changes single logits before anything is ranked. Arrays only, no requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.sampling.fixed_point import F32, FloatArray


def add_bias(logits: FloatArray, bias: Mapping[int, float]) -> None:
    """Add a number to single logits, in place. logits: (V,) float32; every token id below V."""
    ids = np.fromiter(bias.keys(), np.int64, len(bias))
    logits[ids] += np.fromiter(bias.values(), np.float32, len(bias))


def penalize(
    logits: FloatArray, recent: Sequence[int], *, repetition: float, presence: float, frequency: float
) -> None:
    """Lower the logits of recent tokens, in place.

    Repetition divides a positive logit and multiplies the others (Keskar et al. 2019, "CTRL"); frequency is subtracted
    once per occurrence, presence once.

    Args:
        logits: (V,) float32.
        recent: token ids, oldest first; ids outside the vocabulary are ignored.
        repetition: 1 = off.
        presence: 0 = off.
        frequency: 0 = off.
    """
    window = np.asarray(recent, dtype=np.int64)
    ids, counts = np.unique(window[(window >= 0) & (window < len(logits))], return_counts=True)
    values = logits[ids]
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.where(values > 0, values / F32(repetition), values * F32(repetition))
        values -= counts.astype(np.float32) * F32(frequency) + F32(presence)
    logits[ids] = values


def window_of(history: Sequence[int], last_n: int) -> Sequence[int]:
    """The last last_n tokens; all of them for -1."""
    if last_n < 0:
        return history
    return history[max(0, len(history) - last_n) :]
