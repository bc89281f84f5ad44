"""Texts that wait to be embedded: whichever caller has the turn runs a batch of all callers' texts, each in its share.

Nothing is taken out before it is done, so a call that an exception ends loses only its own texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count

import numpy as np
import numpy.typing as npt

from engine.concurrency import fork
from engine.errors import EngineError, copy_error
from engine.model.config import Pooling
from engine.runner.pooling import Pooler
from engine.scheduling.loop import EngineLoop

BATCH_TOKENS = 1024
"""Tokens of a batch, about; one text may have more."""

BATCH_TEXTS = 64
"""Most texts of a batch: on the CPU each takes a page of the cache at least."""

Vector = npt.NDArray[np.float32]


class Group:
    """The texts of one call, in their order.

    Args:
        texts: token ids of each.
        pooling: how they are pooled.
    """

    def __init__(self, texts: Sequence[Sequence[int]], pooling: Pooling) -> None:
        self.texts = texts
        self.pooling = pooling
        self.found: list[Vector] = []  # of the first texts; they are done in order
        self.error: Exception | None = None

    @property
    def over(self) -> bool:
        """Whether nothing of it waits."""
        return self.error is not None or len(self.found) == len(self.texts)


class EmbeddingQueue:
    """Runs the groups of all callers on one model.

    Args:
        loop: lends the runner between two of its steps.
        pooler: of the model.
    """

    def __init__(self, loop: EngineLoop, pooler: Pooler) -> None:
        self._loop = loop
        self._pooler = pooler
        self._groups: deque[Group] = deque()
        fork.register(self)

    def after_fork(self) -> None:
        """In the child of a fork: the threads that wait for these texts are not there."""
        self._groups.clear()

    def run(
        self, texts: Sequence[Sequence[int]], pooling: Pooling, stopped: Callable[[], bool] = lambda: False
    ) -> list[Vector]:
        """What pooling makes of each text; see Pooler.pool.

        Args:
            texts: token ids, at least one for each text.
            pooling: how.
            stopped: asked between batches; whether the caller has given up. The result is then incomplete.

        Raises:
            EngineError: the batch failed, or the model is closed.
        """
        group = Group(texts, pooling)
        self._groups.append(group)
        try:
            while not group.over and not stopped():
                with self._loop.exclusive() as runner:
                    if not group.over:
                        self._run_batch(runner.vectors)
        finally:
            with suppress(ValueError):  # a fork has cleared the queue
                self._groups.remove(group)
        if group.error is not None:
            raise group.error
        return group.found

    def _run_batch(self, vectors: Callable[[Sequence[Sequence[int]]], list[Vector]]) -> None:
        """Some texts of each group that has the same pooling as the first; called with the turn."""
        waiting = [group for group in list(self._groups) if not group.over]
        same = [group for group in waiting if group.pooling is waiting[0].pooling]
        shares = list(_shares(same))
        texts = [group.texts[index] for group, index in shares]
        try:
            found = self._pooler.pool(vectors(texts), same[0].pooling)
        except EngineError as error:
            for group in dict.fromkeys(group for group, _ in shares):
                group.error = copy_error(error)
            return
        for (group, _), vector in zip(shares, found, strict=True):
            group.found.append(vector)
        self._groups.rotate(-1)


def _shares(groups: Sequence[Group]) -> Iterator[tuple[Group, int]]:
    """Texts for one batch, one of each group in turn: the group and the place of the text."""
    n_tokens, n_texts, active = 0, 0, list(groups)
    for offset in count():
        for group in active:
            index = len(group.found) + offset
            if index == len(group.texts):
                continue
            length = len(group.texts[index])
            if n_texts and (n_tokens + length > BATCH_TOKENS or n_texts == BATCH_TEXTS):
                return
            n_tokens, n_texts = n_tokens + length, n_texts + 1
            yield group, index
        active = [group for group in active if len(group.found) + offset + 1 < len(group.texts)]
        if not active:
            return
