"""Perplexity of a text, measured the way llama.cpp's tool does, so that figures can be compared.

The text is tokenized once and cut into chunks of C = `context` tokens that do not overlap; what is left at the end is
dropped. Where the model wants a beginning-of-text token, it replaces the first token of every chunk. Only the tokens at
positions C/2 + 1 .. C - 1 of a chunk count, so that every one of them has at least C/2 tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.errors import ContextFullError, InvalidRequestError
from engine.request import TokenSample
from engine.text import Tokenizer


class Scorer(Protocol):
    """What is asked of an open model; LLM is one."""

    @property
    def context_length(self) -> int:
        """Tokens of one sequence."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    def score(self, chunks: Sequence[Sequence[int]], first: int = 1) -> Iterator[list[TokenSample]]:
        """Log-probability of every token of each chunk from position `first` on."""


@dataclass(frozen=True)
class Perplexity:
    """A measurement, complete or on its way.

    Attributes:
        n_chunks: chunks measured.
        n_tokens: tokens that counted.
        loss: mean negative log-probability of them, in nats.
        loss_error: standard error of that mean.
    """

    n_chunks: int
    n_tokens: int
    loss: float
    loss_error: float

    @property
    def value(self) -> float:
        """The perplexity, exp(loss); infinite where that is beyond what a float holds."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def error(self) -> float:
        """Standard error of the perplexity; as little known as it is where that is infinite."""
        return self.value * self.loss_error if math.isfinite(self.value) else self.value


def cut(llm: Scorer, text: str, context: int) -> list[list[int]]:
    """The chunks of a text, each `context` tokens long.

    Raises:
        InvalidRequestError: context is below 4 or the text is shorter than one chunk.
        ContextFullError: the open model's context is shorter than a chunk.
    """
    if context < 4:
        raise InvalidRequestError(f"context is {context}; at least 4 tokens are needed")
    if context > llm.context_length:
        raise ContextFullError(
            context, llm.context_length, "take a smaller context, or open the model with a larger one"
        )
    tokenizer = llm.tokenizer
    ids = list(tokenizer.encode(text, add_special=True, parse_special=False))
    starts = range(0, len(ids) - context + 1, context)
    if not starts:
        raise InvalidRequestError(f"the text has {len(ids)} tokens; one chunk of {context} is the least")
    chunks = [ids[start : start + context] for start in starts]
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        for chunk in chunks:
            chunk[0] = tokenizer.bos_id
    return chunks


def measure(llm: Scorer, chunks: Sequence[Sequence[int]]) -> Iterator[Perplexity]:
    """The running measurement after each chunk made by cut(); the last one is the result."""
    total = squares = 0.0
    count = 0
    for number, samples in enumerate(llm.score(chunks, first=len(chunks[0]) // 2 + 1), start=1):
        for sample in samples:
            assert sample.logprob is not None, "score() gives a log-probability for every token"
            total -= sample.logprob
            squares += sample.logprob**2
            count += 1
        loss = total / count
        variance = max(squares / count - loss**2, 0.0)
        yield Perplexity(number, count, loss, math.sqrt(variance / max(count - 1, 1)))
