"""Launcher of token_experts.cu: experts that a token names. Must not know of models."""

from __future__ import annotations

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch

FILES = ("token_experts.cu",)


def keep_named(scores: DeviceArray, tokens: DeviceArray, named: DeviceArray, n_experts: int) -> None:
    """Scores of experts that a row's token does not name become minus infinity.

    Args:
        scores: float32 (T, >= n_experts), contiguous; the first n_experts columns are changed in place.
        tokens: int32 (T,); rows of tokens outside the vocabulary stay as they are.
        named: int32 (V, U), contiguous, the different experts of each token.
        n_experts: E.
    """
    vocabulary, used = (int(n) for n in named.shape)
    assert scores.flags.c_contiguous and named.flags.c_contiguous and scores.shape[1] >= n_experts
    args = (scores, int(scores.shape[1]), n_experts, tokens, named, used, vocabulary)
    launch(build(FILES).get("keep_named"), int(scores.shape[0]), 128, args)
