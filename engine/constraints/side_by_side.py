"""Masks of several requests computed at the same time, on threads of the library that need no interpreter lock.

Must not know what a mask is for.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher

from engine.concurrency import fork
from engine.errors import EngineError
from engine.sampling.constraint import Bits, TokenMask

FEWEST = 8
"""Masks that are worth the threads: most take 10 us, but those inside of strings of limited length 300 to 600. Of 64
such masks 2 cores compute one in 604 us one after the other, in 310 us side by side."""

MOST_THREADS = 8
"""Matchers that were compiled together share their lexer, and wait for each other: see compiler.py."""


class _Threads:
    """The library's threads, which all models share."""

    def __init__(self) -> None:
        self._executor: LLExecutor | None = None
        fork.register(self)

    def after_fork(self) -> None:
        """See Forked: the child has no such threads."""
        self._executor = None

    def compute(self, matchers: Sequence[LLMatcher], n_words: int) -> Bits:
        """(masks, n_words) uint32: what each matcher allows."""
        if self._executor is None:
            self._executor = LLExecutor(min(MOST_THREADS, os.cpu_count() or 1))
        masks = np.empty((len(matchers), n_words), np.uint32)
        pairs = [(matcher, index) for index, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(pairs, masks.ctypes.data, 4 * n_words, len(masks))
        return masks


_threads = _Threads()


class SideBySide(ABC):
    """A TokenMask whose bits may be computed before they are asked for.

    Attributes:
        ready: what bits() finds for the tokens followed so far, once computed; it holds for the next call alone.
        lexer: masks of one grammar with the same number wait for each other.
    """

    ready: Bits | None = None
    lexer: int = 0

    @abstractmethod
    def matcher_behind(self, output_ids: Sequence[int]) -> tuple[LLMatcher, int] | None:
        """The matcher that bits() would ask, and the words of its masks; None where it asks none.

        Raises:
            EngineError: see TokenMask.bits, which will say it again.
        """

    def prepare(self, wanted: Sequence[tuple[TokenMask, Sequence[int]]]) -> None:
        """See TokenMask.prepare."""
        found_all, n_words = list[tuple[SideBySide, LLMatcher]](), 0
        for mask, output_ids in wanted:
            if isinstance(mask, SideBySide):
                try:
                    found = mask.matcher_behind(output_ids)
                except EngineError:
                    continue
                if found is not None and n_words in (0, found[1]):
                    n_words = found[1]
                    found_all.append((mask, found[0]))
        if len(found_all) < FEWEST:
            return
        found_all.sort(key=lambda pair: pair[0].lexer)  # a thread takes neighbours
        computed = _threads.compute([matcher for _, matcher in found_all], n_words)
        for (one, _), bits in zip(found_all, computed, strict=True):
            one.ready = bits
