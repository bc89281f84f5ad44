"""Ray Serve's request router for the replicas: those that have read a conversation before, and have its model open."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from engine.cluster.conversation import Conversation
from engine.cluster.prefixes import PrefixMap
from engine.cluster.replica import OPENED

NO_CONVERSATION = Conversation()


class PrefixRouter(RequestRouter):
    """Ranks replicas by PrefixMap. Requests carry their Conversation as keyword argument `conversation`."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray once."""
        self._map: PrefixMap[ReplicaID] = PrefixMap(**kwargs)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Candidates in order of preference, each a rank of its own: the next one is asked where one is full."""
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        return [[by_id[one]] for one in self._map.ranked(_conversation(pending_request), by_id)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica has taken a request."""
        self._map.begin(pending_request.metadata.internal_request_id, _conversation(pending_request), replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request has ended."""
        self._map.end(internal_request_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The replicas that there are now, or what one of them says of itself has changed."""
        super().update_replicas(replicas)
        self._map.keep(replica.replica_id for replica in replicas)
        for replica in replicas:
            self._map.tell_opened(replica.replica_id, replica.routing_stats.get(OPENED, ()))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A replica is gone."""
        super().on_replica_actor_died(replica_id)
        self._map.keep(self.curr_replicas)


def _conversation(request: PendingRequest | None) -> Conversation:
    found = None if request is None else request.kwargs.get("conversation")
    return found if isinstance(found, Conversation) else NO_CONVERSATION
