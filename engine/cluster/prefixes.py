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
from dataclasses import dataclass
from typing import Generic, TypeVar

from engine.cluster.conversation import Conversation

RUNNING_SIZE = 1500
"""What a running request costs the others of its replica: 200 tokens generated beside others take about as long as
reading so many characters. From steps of an 8B model on one H200: a sequence adds 60 us, and 140 tokens of a prompt
take 4 ms."""
SLACK = 4 * RUNNING_SIZE
"""By how much more than the least busy replica one may have to do without being avoided: a prompt that is read again
costs all of its replica's requests time, and a few requests more or less change little."""
MOST_BEGINNINGS = 200_000
"""Beginnings remembered for each replica; those used least recently are forgotten, as its cache forgets them."""

R = TypeVar("R", bound=Hashable)


@dataclass
class _Running(Generic[R]):
    """A request that a replica was given: what it costs while it runs."""

    replica: R
    size: int


class PrefixMap(Generic[R]):
    """What the replicas of one deployment were given.

    Args:
        most: beginnings remembered for each replica.
        seed: of the choice between equals.
    """

    def __init__(self, most: int = MOST_BEGINNINGS, seed: int | None = None) -> None:
        self._most = most
        self._dice = random.Random(seed)
        self._read: dict[R, OrderedDict[bytes, None]] = {}
        self._load: dict[R, int] = {}
        self._running: dict[str, _Running[R]] = {}

    def ranked(self, conversation: Conversation, replicas: Iterable[R]) -> list[R]:
        """Replicas, the best one for a request first."""
        loads = {replica: self._load.get(replica, 0) for replica in replicas}
        much = min(loads.values(), default=0) + SLACK
        order = list(loads)
        self._dice.shuffle(order)

        def cost(replica: R) -> tuple[int, int]:
            load = loads[replica]
            return self._unread(conversation, replica) + max(0, load - much), load

        return sorted(order, key=cost)

    def begin(self, request_id: str, conversation: Conversation, replica: R) -> None:
        """A replica was given a request."""
        if request_id in self._running:  # the same request again, after a replica was lost
            self.end(request_id)
        size = RUNNING_SIZE + self._unread(conversation, replica)
        self._running[request_id] = _Running(replica, size)
        self._load[replica] = self._load.get(replica, 0) + size
        read = self._read.setdefault(replica, OrderedDict())
        for one in conversation.hashes:
            read[one] = None
            read.move_to_end(one)
        while len(read) > self._most:
            read.popitem(last=False)

    def end(self, request_id: str) -> None:
        """A request has ended, however that came."""
        running = self._running.pop(request_id, None)
        if running is not None and running.replica in self._load:
            self._load[running.replica] -= running.size

    def keep(self, replicas: Iterable[R]) -> None:
        """Forget all replicas but these."""
        alive = set(replicas)
        for replica in set(self._read) | set(self._load):
            if replica not in alive:
                self._read.pop(replica, None)
                self._load.pop(replica, None)
        self._running = {one: running for one, running in self._running.items() if running.replica in alive}

    def _unread(self, conversation: Conversation, replica: R) -> int:
        """Characters of a conversation that a replica has not been given before."""
        read = self._read.get(replica)
        if not read:
            return conversation.size
        for one, size in zip(reversed(conversation.hashes), reversed(conversation.sizes), strict=True):
            if one in read:
                return conversation.size - size
        return conversation.size
