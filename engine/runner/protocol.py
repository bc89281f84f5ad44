"""The model on its device, as the scheduler sees it: work in, tokens out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.errors import EngineError
from engine.model.brick_time import BrickTime
from engine.model.cache import StateStore
from engine.model.config import ModelConfig, Pooling
from engine.model.memory import MemoryPlan
from engine.request import TokenSample, Work

KnownRoom = Callable[[int, int], int]
"""(sequences of a decode step, forced tokens that wait behind their next ones) → how many of these the step takes as
well. Whatever it says, texts are the same."""


class Runner(Protocol):
    """One model with its cache on one device. Called by one thread at a time."""

    config: ModelConfig
    context_length: int
    max_sequences: int
    device_name: str
    threads: int | None
    n_pages: int  # pages of the cache that the scheduler may hand out
    prefill_chunk: int  # prompt tokens of a step without decoding sequences
    mixed_chunk: int  # prompt tokens of a step beside decoding sequences
    mixed_per_sequence: int  # of each of those, where that is more together; at most prefill_chunk in all
    shortest_piece: int  # a token drawn and those that a constraint forces behind it are fed together from so many on
    known_room: KnownRoom | None  # where forced tokens are rows of decode steps; None: they are pieces
    lookahead: int  # positions after a decoding sequence's token that may be written as well, where it has pages
    text_tokens: int  # tokens of whole texts for one call of vectors(), about; one text may have more
    most_texts: int  # texts of such a call

    @property
    def states(self) -> StateStore | None:
        """The recurrent states; None where the model has none."""

    def step(self, work: Sequence[Work]) -> Sequence[TokenSample | EngineError | None]:
        """Feed each item's tokens, append to the caches, and draw a token where item.sample says so.

        Every sequence has pages for all tokens fed, and those written to are its alone. Where rows and states go
        depends on the items alone, so that an interrupted step can be repeated. What makes one draw impossible (a bias
        that forbids every token) is returned in its place; the others continue. If a step raises, no item counts as
        done.
        """

    def score(self, work: Work) -> list[TokenSample]:
        """Feed one item's tokens like step(), without drawing; for each the log-probability of the next prompt token.

        work.sequence.prompt_ids holds it; params.prompt_logprobs says how many alternatives to name.
        """

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """(T, V) float32 logits of a fresh sequence, outside the scheduler's pages."""

    def vectors(self, texts: Sequence[Sequence[int]], pooling: Pooling) -> list[npt.NDArray[np.float32]]:
        """For each text the vectors of its tokens behind the last norm, as pooled() in engine.model.pooling gives them.

        With NONE they are (T, D), with MEAN, CLS and LAST (1, D). The texts, of at least one token each, share batches
        outside the scheduler's pages.

        Raises:
            ContextFullError: a text is longer than the context.
        """

    def release(self, slot: int) -> None:
        """The slot's sequence has ended or moved; its pages may be given to another at once."""

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages of the cache, (source, target) each, keys and values of all layers."""

    def save_pages(self, pages: Sequence[int]) -> Any:
        """What pages hold, kept outside the cache, bit for bit."""

    def load_pages(self, saved: Any, pages: Sequence[int]) -> None:
        """Put back what save_pages() kept, into as many pages."""

    def memory_plan(self) -> MemoryPlan:
        """What the open model takes."""

    def read_bandwidth(self) -> float | None:
        """Measured bytes per second that the device reads from its memory; None where it is not known."""

    def profile(self, depth: int, n_rows: int) -> list[BrickTime]:
        """Time every brick of a decode step of n_rows sequences with `depth` tokens in the cache of each.

        Raises:
            InvalidRequestError: the device has no profile, no room for that depth or so many rows, or sequences are
                running.
        """

    def close(self) -> None:
        """Free everything on the device. A call that was cut short can be repeated; one too many does nothing."""
