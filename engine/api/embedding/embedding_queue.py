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
from engine.runner.protocol import Runner
from engine.scheduling.loop import EngineLoop

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
                        self._run_batch(runner)
        finally:
            with suppress(ValueError):  # a fork has cleared the queue
                self._groups.remove(group)
        if group.error is not None:
            raise group.error
        return group.found

    def _run_batch(self, runner: Runner) -> None:
        """Some texts of each group that has the same pooling as the first; called with the turn."""
        waiting = [group for group in list(self._groups) if not group.over]
        same = [group for group in waiting if group.pooling is waiting[0].pooling]
        shares, pooling = list(_shares(same, runner.text_tokens, runner.most_texts)), same[0].pooling
        texts = [group.texts[index] for group, index in shares]
        try:
            found = self._pooler.pool(runner.vectors(texts, self._pooler.reads(pooling)), pooling)
        except EngineError as error:
            for group in dict.fromkeys(group for group, _ in shares):
                group.error = copy_error(error)
            return
        for (group, _), vector in zip(shares, found, strict=True):
            group.found.append(vector)
        self._groups.rotate(-1)


def _shares(groups: Sequence[Group], most_tokens: int, most_texts: int) -> Iterator[tuple[Group, int]]:
    """Texts for one batch, one of each group in turn: the group and the place of the text."""
    n_tokens, n_texts, active = 0, 0, list(groups)
    for offset in count():
        for group in active:
            index = len(group.found) + offset
            if index == len(group.texts):
                continue
            length = len(group.texts[index])
            if n_texts and (n_tokens + length > most_tokens or n_texts == most_texts):
                return
            n_tokens, n_texts = n_tokens + length, n_texts + 1
            yield group, index
        active = [group for group in active if len(group.found) + offset + 1 < len(group.texts)]
        if not active:
            return
