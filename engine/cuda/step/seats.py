"""Sequences of the scheduler in the slots of the GPU: each row has its pages, its mask and its state before a step.

Must not know what is launched, or when.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import PAGE
from engine.cuda.attention.step_rows import KnownToken
from engine.cuda.step.machine import StepMachine
from engine.cuda.step.run_ahead import RunAhead
from engine.errors import ContextFullError, EngineError
from engine.request import ActiveSequence, TokenSample, Work


class Seats:
    """The rows of one runner.

    Args:
        machine: what is on the GPU.
        loop: how far each row is ahead.
        context_length: positions of one sequence.
    """

    def __init__(self, machine: StepMachine, loop: RunAhead, context_length: int) -> None:
        self._machine = machine
        self._loop = loop
        self._context_length = context_length

    def send_mask(self, item: Work, failures: dict[int, TokenSample | EngineError]) -> bool:
        """The device knows which tokens may be drawn; False, and the reason by slot, where the constraint failed."""
        sequence = item.sequence
        if sequence.mask is None or not item.sample:
            return True
        try:
            self._machine.slots.set_mask(sequence.slot, sequence.mask.bits(sequence.output_ids))
        except EngineError as error:
            failures[sequence.slot] = error
            self._loop.stop(sequence.slot)
            return False
        return True

    def seat(self, items: Sequence[Work]) -> None:
        """Decode rows have their pages and are on the device as the items say; mostly they are already."""
        set_pages, holds, extend = self._machine.cache.set_pages, self._loop.holds, self._loop.extend
        for item in items:
            sequence = item.sequence
            set_pages(sequence.slot, sequence.pages)
            limit, token = self._limit(sequence), item.token_ids[0]
            if holds(sequence, item.start, token):
                extend(sequence.slot, limit)
            else:
                self._begin(sequence, item.start, limit, token)

    def _begin(self, sequence: ActiveSequence, start: int, limit: int, token: int) -> None:
        """The device is told of a row that it has not, or that it has brought elsewhere."""
        self.check_room(start + 1)
        self._machine.slots.begin(sequence, start, limit, token)
        if self._machine.states is not None:
            self._machine.states.seat(sequence.slot, sequence.state_place, start)
        self._loop.start(sequence.slot, sequence.request_id, start, token, limit, masked=sequence.mask is not None)

    def send_masks(self, work: Sequence[Work], failures: dict[int, TokenSample | EngineError]) -> list[Work]:
        """Seated rows have the masks of the tokens they draw next. Returns those whose constraint did not fail."""
        missing = [
            item for item in work if item.sequence.mask is not None and self._loop.wants_mask(item.sequence.slot)
        ]
        wanted = [(one.mask, one.output_ids) for item in missing if (one := item.sequence).mask is not None]
        if wanted:
            wanted[0][0].prepare(wanted)
        failed = set()
        for item in missing:
            if self.send_mask(item, failures):
                self._loop.give_mask(item.sequence.slot)
            else:
                failed.add(item.sequence.slot)
        return [item for item in work if item.sequence.slot not in failed] if failed else list(work)

    def pass_over(self, item: Work) -> None:
        """A seated row, whose token is in the cache, goes on behind known tokens of an item, which are fed as well."""
        sequence, slot, position = item.sequence, item.sequence.slot, item.start + len(item.token_ids)
        token, limit = sequence.output_ids[position - len(sequence.prompt_ids)], self._limit(sequence)
        assert position < limit, "a row without a page for the token behind the known ones"
        self._machine.slots.pass_over(sequence, position, limit, token)
        self._loop.start(slot, sequence.request_id, position, token, limit, masked=sequence.mask is not None)
        known = enumerate(item.token_ids[1:], item.start + 1)
        self._loop.feed_known([KnownToken(slot, token_id, at) for at, token_id in known])

    def open_pages(self, item: Work) -> int:
        """A prompt's slot reads its pages. Returns the first position that the row must not feed ahead."""
        sequence, end = item.sequence, item.start + len(item.token_ids)
        self.check_room(end)
        assert len(sequence.pages) * PAGE >= end, "a prompt without pages for its tokens"
        self._loop.stop(sequence.slot)
        self._machine.cache.set_pages(sequence.slot, sequence.pages)
        return self._limit(sequence)

    def _limit(self, sequence: ActiveSequence) -> int:
        """The first position that a row must not feed ahead: it has no page for it, or no use."""
        limit, end = len(sequence.pages) * PAGE, sequence.end
        most = self._context_length if end is None or end > self._context_length else end
        return most if most < limit else limit

    def read(self, wanted: dict[int, list[tuple[int, ActiveSequence]]]) -> dict[int, TokenSample | EngineError]:
        """Results by slot, of (column, sequence) by place; waits for them."""
        found: dict[int, TokenSample | EngineError] = {}
        for place, entries in wanted.items():
            self._machine.wait(place)
            for (_, sequence), sample in zip(entries, self._machine.slots.read(place, entries), strict=True):
                found[sequence.slot] = sample
                if isinstance(sample, TokenSample):
                    self._loop.learn(sequence.slot, sample.token_id)
                else:
                    self._loop.stop(sequence.slot)
        return found

    def check_room(self, length: int) -> None:
        """Refuse more positions than a sequence may have.

        Raises:
            ContextFullError: there are more.
        """
        if length > self._context_length:
            raise ContextFullError(length, self._context_length)
