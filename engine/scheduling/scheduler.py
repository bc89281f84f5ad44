"""Which sequences run in the next step, with which pages of the cache. Integers only: no arrays, no devices, no text.

Every step feeds one token of each decoding sequence and, within a budget, pieces of the prompts that are still being
read, so that a long prompt slows the running streams down but never stops them. Tokens that a constraint forces are
known like those of a prompt: the runner has rows for some of them in its decode steps, or they are fed in such pieces
as well. Requests start in order of arrival and none overtakes another. Pages are allocated as sequences grow. When
there are none left, the sequence that arrived last is preempted: its pages are saved outside the cache, and it resumes,
before any waiting request starts, when there is room. Sequences of models with recurrent layers also have a state, of
which the scheduler holds the place in its ring (docs/decisions/repeatable-step.md).

An exception may arrive between any two lines (docs/decisions/exceptions-at-any-line.md). Each change therefore has one
statement that makes it true, and recover() derives all other fields from those.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from engine.config import CHECKPOINT_SPACING, PAGE, page_count
from engine.request import ActiveSequence, Request, TokenSample, Work
from engine.runner.protocol import KnownRoom
from engine.scheduling.actions import Action, LeaveSlot, LoadPages, RestoreCheckpoint, SaveCheckpoint, SavePages
from engine.scheduling.checkpoints import CheckpointPool
from engine.scheduling.page_pool import PagePool
from engine.scheduling.pieces import Spacing, longest, next_piece, outputs_before, with_drafts
from engine.scheduling.prefixes import Prefixes
from engine.scheduling.slots import Slots


@dataclass(eq=False)  # compare by identity: comparing fields cost 3 ms per step of 64 sequences
class _Started:
    """A request that has started, and its sequence; `seated` where it has a slot and pages, else it was preempted."""

    request: Request
    sequence: ActiveSequence
    seated: bool = True


class Scheduler:
    """Waiting, running and preempted requests, and the slots and pages they hold.

    Args:
        max_sequences: sequences that run side by side.
        n_pages: pages of the cache.
        prefill_chunk: most tokens of pieces in a step without decoding sequences.
        mixed_chunk: most tokens of pieces in a step beside decoding sequences.
        mixed_per_sequence: of each decoding sequence, where that is more; at most prefill_chunk together.
        known_room: see runner.protocol; None: forced tokens are pieces.
        lookahead: positions behind a decoding sequence's token that get pages as well where there are free ones.
        prefix_cache: use pages of earlier prompts that began with the same tokens.
        checkpoints: entries for copies of recurrent states; None where the model has no recurrent layers.
        checkpoint_spacing: positions between two of them in a prompt, a multiple of PAGE.

    Attributes:
        actions: what must happen to the cache before the next step, oldest first; the loop removes each one done.
        n_preemptions: how often a sequence was preempted.
    """

    def __init__(
        self,
        max_sequences: int,
        n_pages: int,
        *,
        prefill_chunk: int = 512,
        mixed_chunk: int = 512,
        mixed_per_sequence: int = 0,
        known_room: KnownRoom | None = None,
        lookahead: int = 0,
        prefix_cache: bool = True,
        checkpoints: int | None = None,
        checkpoint_spacing: int = CHECKPOINT_SPACING,
    ) -> None:
        assert checkpoint_spacing > 0, "the spacing of checkpoints must be positive"
        assert checkpoint_spacing % PAGE == 0, "checkpoints are taken at page borders"
        self._stateful = checkpoints is not None
        self._spacing = Spacing(checkpoint_spacing if checkpoints and prefix_cache else None, self._stateful)
        pool = None if checkpoints is None else CheckpointPool(checkpoints)
        self.blocks = PagePool(n_pages, prefix_cache=prefix_cache, checkpoints=pool)
        self.actions: deque[Action] = deque()
        self.n_preemptions = 0
        self._prefixes = Prefixes(self.blocks, self.actions, self._spacing, stateful=self._stateful)
        assert min(prefill_chunk, mixed_chunk) >= self._spacing.pieces, "no piece could end at a border"
        self._prefill_chunk = prefill_chunk
        self._mixed_chunk = mixed_chunk
        self._mixed_per_sequence = mixed_per_sequence
        self._known_room = known_room
        self._lookahead = lookahead
        self._prefix_cache = prefix_cache
        self._waiting: dict[int, Request] = {}  # by id, in order of arrival
        self._started: list[_Started] = []  # in order of arrival
        self._slots = Slots(max_sequences)

    @property
    def n_waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._seated())

    @property
    def n_preempted(self) -> int:
        """Requests that have started and wait to go on."""
        return len(self._started) - len(self._seated())

    def sequences(self) -> list[ActiveSequence]:
        """The sequences that hold a slot, in order of arrival."""
        return [one.sequence for one in self._seated()]

    def slot_of(self, request_id: int) -> int | None:
        """The slot that a request holds."""
        one = self._find(request_id)
        return one.sequence.slot if one is not None and one.seated else None

    def add(self, request: Request) -> None:
        """Queue a request behind those that wait; once, however often it is added."""
        assert request.prompt_ids, "an empty prompt must be refused before"
        assert page_count(longest(request)) <= self.blocks.n_pages, (
            "a request longer than the cache must be refused before"
        )
        self._waiting[request.request_id] = request

    def remove(self, request_id: int) -> int | None:
        """Forget a request, finished or not; returns the slot it held, None where it held none."""
        self._prefixes.release_copied()  # no plan may follow that would do it
        self._waiting.pop(request_id, None)
        one = self._find(request_id)
        if one is None:
            return None
        self._started.remove(one)
        if not one.seated:
            return None
        self._leave(one.sequence)
        return one.sequence.slot

    def plan(self) -> list[Work]:
        """Say what to feed next, after `actions`; [] when nothing is left to do, or only actions are.

        Planning again before the work was committed gives work that does the same.
        """
        self._prefixes.release_copied()
        self._admit()
        running = self._seated()
        self._close_ranks(running)
        work: list[Work] = []
        known: list[_Started] = []
        reading: list[_Started] = []
        ahead: list[Work] = []  # of those planned, the ones that may lack pages behind the next token
        n_preemptions, reach, make = self.n_preemptions, 1 + self._lookahead, tuple.__new__
        # With hundreds of sequences this loop is what a step costs here: what rarely happens is behind one comparison.
        for one in running:
            sequence = one.sequence
            start = sequence.n_cached
            if start < sequence.pieces_end:
                reading.append(one)
            elif one.seated and (start < (n := len(sequence.pages) * PAGE) or self._make_room(one, start + 1)):
                if start >= sequence.known_end:
                    item = make(Work, (sequence, (sequence.output_ids[-1],), start, True, False, True, ()))
                    work.append(item)
                    if start + reach > n or sequence.draft_ids:
                        ahead.append(item)
                else:
                    known.append(one)
        n_decode = len(work)
        if known:
            work += self._known(known, len(work))
        beside = min(self._prefill_chunk, max(self._mixed_chunk, self._mixed_per_sequence * len(work)))
        work += self._pieces(reading, beside if work else self._prefill_chunk)
        if self.n_preemptions > n_preemptions:
            # A prompt that arrived earlier may have preempted a sequence whose work was planned already.
            still_here = {id(one.sequence) for one in running if one.seated}
            work = [item for item in work if id(item.sequence) in still_here]
            ahead = [item for item in ahead if id(item.sequence) in still_here]
            n_decode = len([item for item in work if item.decode and item.sample])
        for item in (*ahead, *work[n_decode:]):
            sequence = item.sequence
            if item.sample:
                end = item.start + len(item.token_ids) + len(sequence.draft_ids)
                if end + self._lookahead > len(sequence.pages) * PAGE:
                    self._look_ahead(sequence, end)
        if any(item.sequence.draft_ids for item in ahead):
            return [with_drafts(item) if item.sequence.draft_ids else item for item in work]
        return work

    def commit(
        self,
        work: Work,
        sample: TokenSample | None,
        accepted: Ids[TokenSample] = (),
        forced: Ids[int] = (),
    ) -> None:
        """Record that a work item was done. Cut short, it may be called again as long as `n_cached` is where it was.

        Args:
            work: the item.
            sample: the last token it drew, if it had to draw.
            accepted: the tokens drawn before that one: the first draft tokens of the item, each drawn as guessed.
            forced: the tokens that follow `sample`, whatever would be drawn; they are fed together with it.
        """
        sequence, n_accepted = work.sequence, len(accepted)
        assert work.start == sequence.n_cached, "work committed twice or out of order"
        if work.decode and sample is not None and not (accepted or forced or sequence.draft_ids):  # mostly
            ids, n_before = sequence.output_ids, work.start + 1 - len(sequence.prompt_ids)
            ids[n_before:] = (sample.token_id,)
            sequence.n_cached, sequence.state_place = work.start + 1, sequence.state_place + 1
            return
        if accepted:
            assert [one.token_id for one in accepted] == list(work.draft_ids[:n_accepted]), (
                "not the drafts of this work"
            )
        if work.sample:
            assert sample is not None, "the runner drew no token"
            # Behind the outputs that there were when the item was planned: an earlier call may have been cut short.
            tokens = [*(one.token_id for one in accepted), sample.token_id] if accepted else [sample.token_id]
            sequence.output_ids[outputs_before(work) :] = [*tokens, *forced] if forced else tokens
            sequence.draft_ids = []
            if forced and self._known_room is not None:
                sequence.known_end = len(sequence.prompt_ids) + len(sequence.output_ids) - 1
            elif forced:
                sequence.pieces_end = len(sequence.prompt_ids) + len(sequence.output_ids)
        n_cached = work.start + len(work.token_ids) + n_accepted
        # The statement that makes it true. Nothing can come between the two: both are plain stores.
        sequence.n_cached, sequence.state_place = n_cached, sequence.state_place + 1 + n_accepted
        if not work.decode and n_cached <= len(sequence.prompt_ids):
            self._prefixes.remember(sequence)

    def drop_checkpoint(self, action: SaveCheckpoint) -> None:
        """A state could not be kept: no prompt resumes from that entry."""
        self.blocks.drop_checkpoint(action.entry)

    def is_scored(self, request_id: int) -> bool:
        """Whether a running request that generates nothing has seen all of its prompt but the last token."""
        one = self._find(request_id)
        assert one is not None, "a request that has not started"
        return one.sequence.n_cached >= len(one.request.prompt_ids) - 1

    def recover(self, alive: Iterable[Request]) -> None:
        """Make all fields agree again after an exception has cut a change short. May be repeated.

        True are: the requests given, which of them have started and are seated, slots and pages of seated sequences,
        actions, and known pages. Everything else follows from these.

        Args:
            alive: the requests that have not ended, in order of arrival.
        """
        requests = {request.request_id: request for request in alive}
        self._started = [one for one in self._started if one.request.request_id in requests]
        started = {one.request.request_id for one in self._started}
        self._waiting = {number: request for number, request in requests.items() if number not in started}
        for one in self._started:
            if not one.seated:
                one.sequence.pages = []
        seated = self.sequences()
        self._slots.recover({sequence.slot for sequence in seated})
        self._prefixes.recover()
        self.blocks.recover([*(sequence.pages for sequence in seated), self._prefixes.sources])

    # ---- who runs --------------------------------------------------------------------------------------------

    def _seated(self) -> list[_Started]:
        return [one for one in self._started if one.seated]

    def _find(self, request_id: int) -> _Started | None:
        # No generator: an exception that arrives while one is closed early is lost.
        for one in self._started:
            if one.request.request_id == request_id:
                return one
        return None

    def _admit(self) -> None:
        """Give slots to preempted requests, then to waiting ones, as long as there are slots and pages."""
        if not self._slots.free:
            return
        for one in self._started:
            if not one.seated and not (self._slots.free and self._resume(one)):
                return
        while self._slots.free and self._waiting:
            request = next(iter(self._waiting.values()))
            shares_with = request.shares_with if self._prefix_cache else None
            if shares_with is not None and self._is_reading(shares_with):
                return  # the pages it shares are not there yet
            if not self._start(request):
                return
            self._waiting.pop(request.request_id)

    def _resume(self, one: _Started) -> bool:
        """Give a preempted sequence a slot and pages again, if there is room."""
        sequence = one.sequence
        n_pages = page_count(sequence.n_cached)
        # Room for the next page as well, or it would soon be preempted again.
        if not self.blocks.can_allocate(n_pages + 1) and not (not self._seated() and self.blocks.can_allocate(n_pages)):
            return False
        sequence.slot, sequence.pages = self._slots.take(), self.blocks.allocate(n_pages)
        self.actions.append(LoadPages(sequence.request_id, sequence.slot, tuple(sequence.pages), self._place(sequence)))
        one.seated = True
        return True

    def _start(self, request: Request) -> bool:
        """Give a request a slot and what the cache already holds of its prompt, if there is room for the rest of it."""
        claim = self._prefixes.claim(request, alone=not self._seated())
        if claim is None:
            return False
        slot, prompt = self._slots.take(), request.prompt_ids
        if claim.entry is not None:
            self.actions.append(RestoreCheckpoint(request.request_id, claim.entry, slot, 0))
        n_cached, pages = claim.n_cached, claim.pages
        sequence = ActiveSequence(request.request_id, slot, prompt, [], request.params, request.seed, n_cached, pages)
        sequence.cached_tokens, sequence.end, sequence.mask = n_cached, longest(request), request.mask
        sequence.parts_at = claim.parts_at
        self._started.append(_Started(request, sequence))
        return True

    def _is_reading(self, request_id: int) -> bool:
        """Whether a request has started and not yet drawn its first token."""
        one = self._find(request_id)
        return one is not None and not one.sequence.output_ids

    def _close_ranks(self, running: list[_Started]) -> None:
        """Move sequences to lower slots, where steps then have fewer rows."""
        for sequence in self._slots.to_move([one.sequence for one in running]):
            old = sequence.slot
            self._slots.give(old)
            slot = self._slots.take()
            self.actions.append(LeaveSlot(sequence.request_id, old, slot, self._place(sequence)))
            sequence.slot = slot

    def _leave(self, sequence: ActiveSequence) -> None:
        self._slots.give(sequence.slot)
        self.blocks.release(sequence.pages)
        sequence.pages = []

    def _preempt(self, one: _Started) -> None:
        """Take slot and pages from a sequence; it resumes later from where it is."""
        sequence = one.sequence
        self.n_preemptions += 1
        used = sequence.pages[: page_count(sequence.n_cached)]
        self.actions.append(SavePages(sequence.request_id, sequence.slot, tuple(used), self._place(sequence)))
        one.seated = False
        self._leave(sequence)

    def _place(self, sequence: ActiveSequence) -> int | None:
        """The place of a sequence's state; None where it has none."""
        return sequence.state_place if self._stateful and sequence.n_cached else None

    # ---- pages -----------------------------------------------------------------------------------------------

    def _make_room(self, one: _Started, n_positions: int) -> bool:
        """Give a sequence pages for so many positions, preempting those that arrived after it where pages run out.

        False where there are too few even so; then it was mostly preempted itself.
        """
        if not one.seated:
            return False
        sequence = one.sequence
        missing = page_count(n_positions) - len(sequence.pages)
        while missing > 0 and not self.blocks.can_allocate(missing):
            seated = self._seated()
            if len(seated) == 1:
                assert self._prefixes.sources, "a request that fits the cache runs alone"
                return False  # until those pages have been copied
            self._preempt(seated[-1])
            if seated[-1] is one:
                return False
        if missing > 0:
            sequence.pages += self.blocks.allocate(missing)
        return True

    def _look_ahead(self, sequence: ActiveSequence, end: int) -> None:
        """Give a sequence pages for what the runner computes ahead, if there are free ones.

        A prompt that ends with its last page needs it too: the device feeds its first token before the host sees it.
        """
        end += self._lookahead
        missing = page_count(end if sequence.end is None else min(end, sequence.end)) - len(sequence.pages)
        if missing > 0 and self.blocks.can_allocate(missing):
            sequence.pages += self.blocks.allocate(missing)

    # ---- known tokens ----------------------------------------------------------------------------------------

    def _known(self, running: list[_Started], n_others: int) -> list[Work]:
        """Known tokens of sequences: the first of each, and as many behind these as the runner has room for.

        The token behind them gets a page as well, so that the same step of the device can feed it.
        """
        assert self._known_room is not None, "known tokens are pieces"
        sequences = [one.sequence for one in running]
        wanted = sum(sequence.known_end - sequence.n_cached - 1 for sequence in sequences)
        room = self._known_room(n_others + len(running), wanted)
        work = []
        for one in running:
            sequence, start = one.sequence, one.sequence.n_cached
            n = min(sequence.known_end - start, 1 + room)
            if self._make_room(one, start + n + 1):
                room -= n - 1
                first = start - len(sequence.prompt_ids)
                work.append(Work(sequence, sequence.output_ids[first : first + n], start, False, False, True))
        return work

    # ---- pieces ----------------------------------------------------------------------------------------------

    def _pieces(self, running: list[_Started], budget: int) -> list[Work]:
        """Pieces of prompts and of forced tokens in order of arrival, together at most `budget` tokens."""
        pieces: list[Work] = []
        for one in running:
            if budget == 0:
                break
            if one.sequence.n_cached >= one.sequence.pieces_end or not one.seated:
                continue
            work = next_piece(one.request, one.sequence, budget, self._spacing)
            if work is None:
                if one.sequence.pieces_end - one.sequence.n_cached > budget:
                    break  # no border within the budget; a shorter prompt would overtake this one
                continue
            if not self._make_room(one, work.start + len(work.token_ids)):
                break  # this request was preempted itself; later ones cannot get pages either
            budget -= len(work.token_ids)
            pieces.append(work)
        return pieces
