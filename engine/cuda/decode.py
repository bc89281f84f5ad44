"""Decode steps: captured once per number of rows, replayed, and kept one step ahead of the host.

Row b of a step is slot b. A step feeds every active slot its last token, samples the next one, and leaves token and
position on the device for the step after it, so that the next step can be launched before the host has seen this one's
result. Results wait in a queue per slot until they are asked for; a slot that ends in between simply drops them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.request import Sequence, TokenSample

AHEAD = 2
"""Steps launched and not yet read: one that runs while the host handles the last result, one behind it. A slot that
was there before another joined may be one step further ahead."""


@dataclass
class _Slot:
    """What the host knows of a slot.

    Attributes:
        request_id: whose tokens these are.
        position: position the device will feed next.
        read: position whose result is read next.
        token: the last token read, which is what `read` feeds.
        results: places of results not read yet, oldest first.
    """

    request_id: int
    position: int
    read: int
    token: int
    results: deque[int] = field(default_factory=deque)


class DecodeLoop:
    """Launches steps and hands out their results in order.

    Args:
        enqueue: enqueue(n) puts one step over rows 0..n-1 on the stream and returns the place of its results.
        wait: wait(place) returns once that step has ended.
        read: read(place, slot, sequence) gives the result of a step that has ended.
        deactivate: deactivate(slot) takes a slot out of the following steps.
        buckets: numbers of rows a step may have, ascending.
        context_length: positions of a slot; the device itself deactivates a slot that reaches it.
    """

    def __init__(
        self,
        *,
        enqueue: Callable[[int], int],
        wait: Callable[[int], None],
        read: Callable[[int, int, Sequence], TokenSample],
        deactivate: Callable[[int], None],
        buckets: tuple[int, ...],
        context_length: int,
    ) -> None:
        self._enqueue = enqueue
        self._wait = wait
        self._read = read
        self._deactivate = deactivate
        self._buckets = buckets
        self._context_length = context_length
        self._slots: dict[int, _Slot] = {}

    def start(self, slot: int, request_id: int, position: int, token: int) -> None:
        """The slot's next step feeds `token` at `position`; the device has both already."""
        self._slots[slot] = _Slot(request_id, position, position, token)

    def stop(self, slot: int) -> None:
        """Takes the slot out of the following steps and drops what it was ahead."""
        if self._slots.pop(slot, None) is not None:
            self._deactivate(slot)

    def holds(self, sequence: Sequence, start: int, token: int) -> bool:
        """Whether feeding that token at that position is what the slot would do next."""
        slot = self._slots.get(sequence.slot)
        return slot is not None and (slot.request_id, slot.read, slot.token) == (sequence.request_id, start, token)

    def step(self, sequences: Iterable[Sequence]) -> list[TokenSample]:
        """The next token of each sequence, all of them held; launches further steps as it goes."""
        wanted = list(sequences)
        while any(self._needs_launch(self._slots[sequence.slot]) for sequence in wanted):
            self._launch()
        samples = []
        for sequence in wanted:
            state = self._slots[sequence.slot]
            place = state.results.popleft()
            self._wait(place)
            sample = self._read(place, sequence.slot, sequence)
            state.read += 1
            state.token = sample.token_id
            samples.append(sample)
        return samples

    def _needs_launch(self, state: _Slot) -> bool:
        # Judged by the slot that is least ahead: one that joined between two launches would else wait for every step.
        return len(state.results) < AHEAD and state.position < self._context_length

    def _launch(self) -> None:
        """One step over all active slots."""
        rows = next(bucket for bucket in self._buckets if bucket > max(self._slots))
        place = self._enqueue(rows)
        for state in self._slots.values():
            if state.position < self._context_length:
                state.results.append(place)
                state.position += 1
