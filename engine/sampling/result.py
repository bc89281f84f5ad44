"""What sampling returns for one token. Independent of requests, models and devices."""

from __future__ import annotations

from typing import NamedTuple


class TokenSample(NamedTuple):
    """One token with its log-probability and the best alternatives, if these were asked for.

    Attributes:
        token_id: the token.
        logprob: its log-probability under the raw logits (before bias, penalties and temperature); with a constraint
            under the masked ones, unless SamplingParams.free_logprobs; None unless asked.
        top_logprobs: (token id, log-probability) of the most probable tokens, best first, ties by lower id.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
