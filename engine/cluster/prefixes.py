"""Which replica should take a request: what each has read before against what each has to do. Knows no Ray.

The measure is characters that a replica has to read before the first token of its answer: those of the request that it
has not read before, and what its running requests cost, as far as that is more than what the least busy replica has to
do and a few requests. So a conversation goes to the replica that holds its pages, until that one has so much more to do
than others that another is faster although it begins anew; what is new goes to the least busy one.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from engine.cluster.conversation import Conversation

RUNNING_SIZE = 1500
"""What a running request costs the others of its replica: 200 tokens generated beside others take about as long as
reading so many characters. From steps of an 8B model on one H200: a sequence adds 60 us, and 140 tokens of a prompt
take 4 ms."""
SLACK = 4 * RUNNING_SIZE
"""By how much more than the least busy replica one may have to do without being avoided: a prompt that is read again
costs all of its replica's requests time, and a few requests more or less change little."""
OPENING_SIZE = 32 * RUNNING_SIZE
"""What opening a model counts: a second replica opens a model when those that have it open have so many more running
requests than others, and not before, as it may have to close another model for it."""
MOST_BEGINNINGS = 200_000
"""Beginnings remembered for each replica; those used least recently are forgotten, as its cache forgets them."""

R = TypeVar("R", bound=Hashable)


@dataclass
class _Running(Generic[R]):
    """A request that a replica was given: what it costs while it runs."""

    replica: R
    size: int
    model: str


@dataclass
class _Given:
    """What one replica was given, and what it says of itself.

    Attributes:
        read: beginnings, those used least recently first.
        load: sizes of its running requests together.
        told: models that it said it has open.
        opened: those, and the ones that it must have opened since for requests.
    """

    read: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    load: int = 0
    told: frozenset[str] = frozenset()
    opened: set[str] = field(default_factory=set)


_NOTHING = _Given()


class PrefixMap(Generic[R]):
    """What the replicas of one deployment were given.

    Args:
        most: beginnings remembered for each replica.
        seed: of the choice between equals.
    """

    def __init__(self, most: int = MOST_BEGINNINGS, seed: int | None = None) -> None:
        self._most = most
        self._dice = random.Random(seed)
        self._given: dict[R, _Given] = {}
        self._running: dict[str, _Running[R]] = {}

    def ranked(self, conversation: Conversation, replicas: Iterable[R]) -> list[R]:
        """Replicas, the best one for a request first."""
        given = {replica: self._given.get(replica, _NOTHING) for replica in replicas}
        much = min((one.load for one in given.values()), default=0) + SLACK
        order = list(given)
        self._dice.shuffle(order)

        def cost(replica: R) -> tuple[int, int, int]:
            one = given[replica]
            excess = max(0, one.load - much)
            if conversation.model and conversation.model not in one.opened:
                return OPENING_SIZE + conversation.size + excess, len(one.opened), one.load
            return _unread(conversation, one) + excess, 0, one.load

        return sorted(order, key=cost)

    def begin(self, request_id: str, conversation: Conversation, replica: R) -> None:
        """A replica was given a request."""
        if request_id in self._running:  # the same request again, after a replica was lost
            self.end(request_id)
        one = self._given.setdefault(replica, _Given())
        size = RUNNING_SIZE + _unread(conversation, one)
        self._running[request_id] = _Running(replica, size, conversation.model)
        one.load += size
        if conversation.model:
            one.opened.add(conversation.model)
        for beginning in conversation.hashes:
            one.read[beginning] = None
            one.read.move_to_end(beginning)
        while len(one.read) > self._most:
            one.read.popitem(last=False)

    def end(self, request_id: str) -> None:
        """A request has ended, however that came."""
        running = self._running.pop(request_id, None)
        if running is not None and running.replica in self._given:
            self._given[running.replica].load -= running.size

    def tell_opened(self, replica: R, models: Iterable[str]) -> None:
        """A replica says which models it has open.

        The same as before is no news: models that it was given requests for since then stay counted as open.
        """
        one, told = self._given.setdefault(replica, _Given()), frozenset(models)
        if told != one.told:
            one.told = told
            wanted = (running.model for running in self._running.values() if running.replica == replica)
            one.opened = {*told, *filter(None, wanted)}

    def keep(self, replicas: Iterable[R]) -> None:
        """Forget all replicas but these."""
        alive = set(replicas)
        self._given = {replica: one for replica, one in self._given.items() if replica in alive}
        self._running = {one: running for one, running in self._running.items() if running.replica in alive}


def _unread(conversation: Conversation, one: _Given) -> int:
    """Characters of a conversation that a replica has not been given before."""
    for beginning, size in zip(reversed(conversation.hashes), reversed(conversation.sizes), strict=True):
        if beginning in one.read:
            return conversation.size - size
    return conversation.size
