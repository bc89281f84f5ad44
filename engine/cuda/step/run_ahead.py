"""Decode steps kept ahead of the host: which rows run, how far each may go, and whose results are waiting where.

Row b of a step is slot b. A step feeds every active row its last token, samples the next one, and leaves token and
position on the device for the step after it, so that the next step can be launched before the host has seen this one's
result. Results wait in a queue per row until they are asked for; a row that ends in between simply drops them. Integers
only: the device is behind the functions given.

Where a step of all rows would cost more than they are worth (launch_plan/costs.py), it takes fewer: those that are
least ahead. Rows then take turns, and row b of a step is the slot chosen for it.

The tokens that a row with a constraint may draw depend on its last token, which the host must have seen. While such a
row runs, a step is launched in two parts: its forward pass ahead, its sampling when the masks are there, so that the
device works while the host makes them. Tokens that are known before a row's newest one (a constraint forces them) are
further rows of such a forward pass.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from engine.cuda.attention.step_rows import KnownToken
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
        fed: what comes before this position is in the cache, or launched.
        masked: the host must have seen the row's last result before the next token can be drawn.
        has_mask: of such a row, the tokens that may be drawn next are known.
        results: places of results not read yet and the row's column in each, oldest first.
    """

    request_id: int
    position: int
    limit: int
    read: int
    token: int | None
    fed: int
    masked: bool = False
    has_mask: bool = False
    results: deque[tuple[int, int]] = field(default_factory=deque)

    @property
    def can_feed(self) -> bool:
        """Whether the row has a page for its next token."""
        return self.position < self.limit

    def drawn(self, place: int, column: int) -> None:
        """A step that feeds the row's next token and draws the one behind it was launched."""
        self.results.append((place, column))
        self.position += 1
        self.fed = self.position
        self.has_mask = False


class RunAhead:
    """Launches steps and says where their results are.

    Args:
        enqueue: enqueue(n) puts one step over rows 0..n-1 on the stream and returns the place of its results.
        enqueue_chosen: enqueue_chosen(slots) likewise, over these slots, whose results are in this order.
        forward: forward(n) puts a step without its sampling on the stream; it may be repeated.
        forward_known: forward_known(n, known) likewise, with rows for these tokens behind those of slots 0..n-1.
        sample: sample(n) puts the sampling of the last forward(n) on the stream and returns the place of its results.
        set_position: set_position(slot, position) for the steps after it; -1 takes the row out.
        set_limit: set_limit(slot, limit) likewise.
        step_sizes: numbers of rows a step may have, ascending.
        turns: by number of rows that could run, how many a step takes; all of them where rows cannot be chosen.
    """

    def __init__(
        self,
        *,
        enqueue: Callable[[int], int],
        enqueue_chosen: Callable[[Sequence[int]], int],
        forward: Callable[[int], None],
        forward_known: Callable[[int, Sequence[KnownToken]], None],
        sample: Callable[[int], int],
        set_position: Callable[[int, int], None],
        set_limit: Callable[[int, int], None],
        step_sizes: tuple[int, ...],
        turns: Sequence[int],
    ) -> None:
        self._enqueue = enqueue
        self._enqueue_chosen = enqueue_chosen
        self._forward = forward
        self._forward_known = forward_known
        self._sample = sample
        self._set_position = set_position
        self._set_limit = set_limit
        self._step_sizes = step_sizes
        self._turns = turns
        self._rows: dict[int, _Row] = {}
        self._resting: set[int] = set()  # rows that the device has been told to leave out
        self._prepared_rows = 0  # of the forward pass whose tokens are not drawn yet; 0: there is none
        self._prepared: dict[int, int] = {}  # its active slots, and the positions that they fed
        self._known: list[KnownToken] = []  # that the next forward pass is to feed as well

    @property
    def idle(self) -> bool:
        """Whether no row is active."""
        return not self._rows

    def start(
        self, slot: int, request_id: int, position: int, token: int | None, limit: int, *, masked: bool = False
    ) -> None:
        """The row's next step feeds `token` at `position`, if that is below limit; the device has been told."""
        self._rows[slot] = _Row(request_id, position, limit, position, token, position, masked)
        self._resting.discard(slot)
        self._prepared.pop(slot, None)

    def wants_mask(self, slot: int) -> bool:
        """Whether a mask must be given before launch_needed() can draw a token of this row."""
        row = self._rows[slot]
        return row.masked and not row.results

    def give_mask(self, slot: int) -> None:
        """The device has the mask for the row's next token."""
        self._rows[slot].has_mask = True

    def learn(self, slot: int, token: int) -> None:
        """The token that a row was started with before the host had seen it."""
        self._rows[slot].token = token

    def stop(self, slot: int) -> None:
        """Takes the row out of the following steps and drops what it was ahead."""
        if slot in self._rows:
            self._set_position(slot, -1)  # first: cut short in between, a later call must find the row to take it out
            self._resting.discard(slot)
            self._prepared.pop(slot, None)
            del self._rows[slot]

    def holds(self, sequence: ActiveSequence, start: int, token: int) -> bool:
        """Whether feeding that token at that position is what the row would do next."""
        row = self._rows.get(sequence.slot)
        return row is not None and row.read == start and row.token == token and row.request_id == sequence.request_id

    def extend(self, slot: int, limit: int) -> None:
        """The row has pages up to there now; one that has stopped at the old limit goes on."""
        row = self._rows[slot]
        if limit == row.limit:  # mostly
            return
        if not row.can_feed:
            self._resting.discard(slot)
            self._set_position(slot, row.position)
        row.limit = limit
        self._set_limit(slot, limit)

    def launch_needed(self, slots: Iterable[int]) -> None:
        """Launches what is missing for every one of these rows to have a result."""
        for slot in slots:
            row = self._rows[slot]
            while not row.results:  # mostly once; where rows take turns, its turn may be the next one
                assert row.has_mask or not row.masked, "a row without the mask of its next token"
                assert row.can_feed, "a row without a page for the token it is fed"
                self._launch()

    def feed(self, slots: Sequence[int]) -> None:
        """The next token of each of these rows is in the cache; of it nothing will be drawn. Mostly it is already."""
        missing = {slot: row for slot in slots if (row := self._rows[slot]).fed == row.position}
        if not missing:
            return
        self.forget_prepared()
        self._rest(set(self._rows) - set(missing))
        self._forward(self._step_size(missing))
        self._rest(set())
        for row in missing.values():
            row.fed += 1

    def feed_known(self, known: Sequence[KnownToken]) -> None:
        """The forward pass that run_ahead() launches next feeds these tokens too."""
        self._known += known

    def run_ahead(self) -> None:
        """Launches until every row that can go on is AHEAD, before the next results are taken.

        A row whose first token the host has not read yet is not read in this step: one step less suffices for it.
        """
        if self._known or any(row.masked and row.position < row.limit for row in self._rows.values()):
            self._prepare()
            return
        while any(
            len(row.results) < (AHEAD if row.token is not None else AHEAD - 1) and row.position < row.limit
            for row in self._rows.values()
        ):
            self._launch()

    def forget_prepared(self) -> None:
        """Something else will use the memory of the logits: a forward pass that waits for its sampling is repeated."""
        self._prepared_rows, self._prepared = 0, {}

    def take(self, slots: Sequence[int]) -> list[tuple[int, int]]:
        """(place, column) of the next result of each of these rows, which must all have one; they count as read."""
        places = []
        for slot in slots:
            row = self._rows[slot]
            places.append(row.results.popleft())
            row.read += 1
            row.token = None
        return places

    def clear(self) -> None:
        """Takes every row out."""
        self.forget_prepared()
        self._known = []
        for slot in list(self._rows):
            self.stop(slot)

    def _launch(self) -> None:
        """One step over all active rows but those that are too far ahead, or whose turn it is not."""
        running, active, masked, waiting = {}, 0, False, set()
        for slot, row in self._rows.items():  # of hundreds of rows: what a step costs the host
            n = len(row.results)
            draws = n < MOST_AHEAD if not row.masked else row.has_mask and n == 0
            if not draws:
                waiting.add(slot)
            if row.position < row.limit:
                active += 1
                if draws:
                    running[slot] = row
                    masked = masked or row.masked
        if self._turns[active] < active and not masked:
            first = sorted(running, key=lambda slot: len(running[slot].results))
            self._launch_chosen(sorted(first[: self._turns[active]]))
            return
        self._rest(waiting)
        if masked:
            prepared = self._prepared_rows > max(running) and all(
                self._prepared.get(slot) == row.position for slot, row in running.items()
            )
            n = self._prepared_rows if prepared else self._step_size(running)
            if not prepared:
                self._forward(n)
            place = self._sample(n)
        else:
            place = self._enqueue(self._step_size(running))
        self.forget_prepared()
        for slot, row in running.items():
            row.drawn(place, slot)
        self._rest(set())

    def _launch_chosen(self, slots: list[int]) -> None:
        self._rest(set())
        place = self._enqueue_chosen(slots)
        self.forget_prepared()
        for column, slot in enumerate(slots):
            self._rows[slot].drawn(place, column)

    def _prepare(self) -> None:
        """The forward pass of the step after this one, over the rows that will be in it.

        A row whose last token the host has seen has one result less by then. Another choice of rows than the later
        one costs a second forward pass, nothing else.
        """
        ahead = {
            slot
            for slot, row in self._rows.items()
            if len(row.results) - (row.token is not None) >= (1 if row.masked else MOST_AHEAD)
        }
        running = {slot: row for slot, row in self._rows.items() if row.can_feed and slot not in ahead}
        if not running and not self._known:
            return
        self._rest(ahead)
        self._prepared_rows = self._step_size(running) if running else 0
        self._prepared = {slot: row.position for slot, row in running.items()}
        if self._known:
            self._forward_known(max(running, default=-1) + 1, self._known)
            self._known = []
        else:
            self._forward(self._prepared_rows)
        for row in running.values():
            row.fed = row.position + 1

    def _step_size(self, running: dict[int, _Row]) -> int:
        return self._step_sizes[bisect_right(self._step_sizes, max(running))]

    def _rest(self, slots: set[int]) -> None:
        """Exactly these rows are left out of what is launched next."""
        for slot in self._resting - slots:
            row = self._rows[slot]
            if row.can_feed:
                self._set_position(slot, row.position)
        for slot in slots - self._resting:
            self._set_position(slot, -1)
        self._resting = slots
