"""Decode steps kept ahead of the host: which rows run, how far each may go, and whose results are waiting where.

Row b of a step is slot b. A step feeds every active row its last token, samples the next one, and leaves token and
position on the device for the step after it, so that the next step can be launched before the host has seen this one's
result. Results wait in a queue per row until they are asked for; a row that ends in between simply drops them. Integers
only: the device is behind the functions given.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from engine.cuda.launch_plan.ahead import AHEAD, MOST_AHEAD
from engine.request import ActiveSequence


@dataclass(slots=True)
class _Row:
    """What the host knows of a row.

    Attributes:
        request_id: whose tokens these are.
        position: position the device will feed next.
        limit: first position it is not to feed; the device stops the row there by itself.
        read: position whose result is read next.
        token: what `read` feeds; None until the host has seen it.
        results: places of results not read yet, oldest first.
    """

    request_id: int
    position: int
    limit: int
    read: int
    token: int | None
    results: deque[int] = field(default_factory=deque)


class RunAhead:
    """Launches steps and says where their results are.

    Args:
        enqueue: enqueue(n) puts one step over rows 0..n-1 on the stream and returns the place of its results.
        set_position: set_position(slot, position) for the steps after it; -1 takes the row out.
        set_limit: set_limit(slot, limit) likewise.
        step_sizes: numbers of rows a step may have, ascending.
    """

    def __init__(
        self,
        *,
        enqueue: Callable[[int], int],
        set_position: Callable[[int, int], None],
        set_limit: Callable[[int, int], None],
        step_sizes: tuple[int, ...],
    ) -> None:
        self._enqueue = enqueue
        self._set_position = set_position
        self._set_limit = set_limit
        self._step_sizes = step_sizes
        self._rows: dict[int, _Row] = {}

    @property
    def idle(self) -> bool:
        """Whether no row is active."""
        return not self._rows

    def start(self, slot: int, request_id: int, position: int, token: int | None, limit: int) -> None:
        """The row's next step feeds `token` at `position`, if that is below limit; the device has been told."""
        self._rows[slot] = _Row(request_id, position, limit, position, token)

    def learn(self, slot: int, token: int) -> None:
        """The token that a row was started with before the host had seen it."""
        self._rows[slot].token = token

    def stop(self, slot: int) -> None:
        """Takes the row out of the following steps and drops what it was ahead."""
        if self._rows.pop(slot, None) is not None:
            self._set_position(slot, -1)

    def holds(self, sequence: ActiveSequence, start: int, token: int) -> bool:
        """Whether feeding that token at that position is what the row would do next."""
        row = self._rows.get(sequence.slot)
        return row is not None and row.read == start and row.token == token and row.request_id == sequence.request_id

    def extend(self, slot: int, limit: int) -> None:
        """The row has pages up to there now; one that has stopped at the old limit goes on."""
        row = self._rows[slot]
        if limit == row.limit:  # mostly
            return
        if row.position >= row.limit:
            self._set_position(slot, row.position)
        row.limit = limit
        self._set_limit(slot, limit)

    def launch_needed(self, slots: Iterable[int]) -> None:
        """Launches what is missing for every one of these rows to have a result."""
        for slot in slots:
            row = self._rows[slot]
            if not row.results:
                assert row.position < row.limit, "a row without a page for the token it is fed"
                self._launch()

    def run_ahead(self) -> None:
        """Launches until every row that can go on is AHEAD, before the next results are taken.

        A row whose first token the host has not read yet is not read in this step: one step less suffices for it.
        """
        while any(
            len(row.results) < (AHEAD if row.token is not None else AHEAD - 1) and row.position < row.limit
            for row in self._rows.values()
        ):
            self._launch()

    def take(self, slots: Sequence[int]) -> list[int]:
        """Places of the next result of each of these rows, which must all have one; they count as read."""
        places = []
        for slot in slots:
            row = self._rows[slot]
            places.append(row.results.popleft())
            row.read += 1
            row.token = None
        return places

    def clear(self) -> None:
        """Takes every row out."""
        for slot in list(self._rows):
            self.stop(slot)

    def _launch(self) -> None:
        """One step over all active rows but those that are too far ahead."""
        resting = [slot for slot, row in self._rows.items() if len(row.results) >= MOST_AHEAD]
        running = {
            slot: row for slot, row in self._rows.items() if row.position < row.limit and len(row.results) < MOST_AHEAD
        }
        for slot in resting:
            self._set_position(slot, -1)
        place = self._enqueue(self._step_sizes[bisect_right(self._step_sizes, max(running))])
        for row in running.values():
            row.results.append(place)
            row.position += 1
        for slot in resting:
            row = self._rows[slot]
            if row.position < row.limit:
                self._set_position(slot, row.position)
