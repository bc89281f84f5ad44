"""Which sequences run in the next step, with which pages of the cache. Integers only: no arrays, no devices, no text.

Every step feeds one token of each decoding sequence and, within a budget, pieces of the prompts that are still being
read, so that a long prompt slows the running streams down but never stops them. Requests start in order of arrival and
none overtakes another. Pages are allocated as sequences grow. When there are none left, the sequence that arrived last
is preempted: its pages are saved outside the cache, and it resumes, before any waiting request starts, when there is
room. Sequences of models with recurrent layers also have a state, of which the scheduler holds the place in its ring
(docs/decisions/repeatable-step.md).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from engine.config import CHECKPOINT_SPACING, PAGE, page_count, step_sizes
from engine.request import ActiveSequence, Request, TokenSample, Work
from engine.scheduling.checkpoints import CheckpointPool
from engine.scheduling.page_pool import PagePool


@dataclass(frozen=True)
class CopyPage:
    """Copy a page of the cache over another one."""

    request_id: int
    source: int
    target: int


@dataclass(frozen=True)
class SavePages:
    """Keep what the pages of a sequence hold, and its state where it has one; the sequence leaves its slot."""

    request_id: int
    slot: int
    pages: tuple[int, ...]
    place: int | None = None


@dataclass(frozen=True)
class LoadPages:
    """Bring back what SavePages kept, into these pages and this place of this slot."""

    request_id: int
    slot: int
    pages: tuple[int, ...]
    place: int | None = None


@dataclass(frozen=True)
class LeaveSlot:
    """A sequence moves to the slot `target`, with its state if it has one; nothing runs in the old slot any more."""

    request_id: int
    slot: int
    target: int
    place: int | None = None


@dataclass(frozen=True)
class SaveCheckpoint:
    """Copy the state at a place of a slot to an entry of the checkpoint pool."""

    request_id: int
    slot: int
    place: int
    entry: int


@dataclass(frozen=True)
class RestoreCheckpoint:
    """Copy an entry of the checkpoint pool to a place of a slot."""

    request_id: int
    entry: int
    slot: int
    place: int


Action = CopyPage | SavePages | LoadPages | LeaveSlot | SaveCheckpoint | RestoreCheckpoint
"""What must happen to the cache, in order, before the next step. Doing one twice in a row changes nothing."""


PATIENCE = 16
"""Plans in a row in which sequences occupy more than twice the slots they need before they move together."""


@dataclass(eq=False)  # compare by identity: comparing fields cost 3 ms per step of 64 sequences
class _Running:
    """A sequence and the request it serves. `arrival` numbers requests in order; `seated`: it holds a slot."""

    request: Request
    sequence: ActiveSequence
    arrival: int
    seated: bool = False


class Scheduler:
    """Waiting, running and preempted requests, and the slots and pages they hold.

    Args:
        max_sequences: sequences that run side by side.
        n_pages: pages of the cache.
        prefill_chunk: most prompt tokens in a step without decoding sequences.
        mixed_chunk: most prompt tokens in a step beside decoding sequences.
        mixed_per_sequence: of each decoding sequence, where that is more; at most prefill_chunk together.
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
        lookahead: int = 0,
        prefix_cache: bool = True,
        checkpoints: int | None = None,
        checkpoint_spacing: int = CHECKPOINT_SPACING,
    ) -> None:
        assert checkpoint_spacing > 0, "the spacing of checkpoints must be positive"
        assert checkpoint_spacing % PAGE == 0, "checkpoints are taken at page borders"
        self._stateful = checkpoints is not None
        self._spacing = checkpoint_spacing if checkpoints and prefix_cache else None
        pool = None if checkpoints is None else CheckpointPool(checkpoints)
        self.blocks = PagePool(n_pages, prefix_cache=prefix_cache, checkpoints=pool)
        self.actions: deque[Action] = deque()
        self.n_preemptions = 0
        self._prefill_chunk = prefill_chunk
        self._mixed_chunk = mixed_chunk
        self._mixed_per_sequence = mixed_per_sequence
        self._lookahead = lookahead
        self._prefix_cache = prefix_cache
        self._waiting: deque[tuple[int, Request]] = deque()
        self._preempted: list[_Running] = []  # in order of arrival
        self._running: list[_Running] = []  # in order of arrival
        self._free_slots = list(range(max_sequences))
        self._step_sizes = step_sizes(max_sequences)
        self._sources: list[int] = []  # pages held until they have been copied
        self._arrivals = 0
        self._scattered = 0  # plans in a row in which fewer slots would have done

    @property
    def n_waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def n_preempted(self) -> int:
        """Requests that have started and wait to go on."""
        return len(self._preempted)

    def sequences(self) -> list[ActiveSequence]:
        """The sequences that hold a slot, in order of arrival."""
        return [running.sequence for running in self._running]

    def add(self, request: Request) -> None:
        """Queue a request behind those that wait."""
        assert request.prompt_ids, "an empty prompt must be refused before"
        assert page_count(_longest(request)) <= self.blocks.n_pages, (
            "a request longer than the cache must be refused before"
        )
        self._waiting.append((self._arrivals, request))
        self._arrivals += 1

    def remove(self, request_id: int) -> int | None:
        """Forget a request, finished or not; returns the slot it held, None where it held none."""
        self._release_copied()  # no plan may follow that would do it
        for index, running in enumerate(self._running):
            if running.request.request_id == request_id:
                del self._running[index]
                self._leave(running)
                return running.sequence.slot
        self._preempted = [one for one in self._preempted if one.request.request_id != request_id]
        self._waiting = deque(entry for entry in self._waiting if entry[1].request_id != request_id)
        return None

    def plan(self) -> list[Work]:
        """Say what to feed next, after `actions`; [] when nothing is left to do, or only actions are.

        Planning again before the work was committed gives work that does the same.
        """
        self._release_copied()
        self._admit()
        self._close_ranks()
        work: list[Work] = []
        preempted = len(self._preempted)
        # With hundreds of sequences this loop is what a step costs here: what rarely happens is behind one comparison.
        for running in list(self._running):
            sequence = running.sequence
            output_ids, start = sequence.output_ids, sequence.n_cached
            if output_ids and (start < len(sequence.pages) * PAGE or self._make_room(running, start + 1)):
                work.append(Work(sequence, output_ids[-1:], start, True, False, True))
        beside = min(self._prefill_chunk, max(self._mixed_chunk, self._mixed_per_sequence * len(work)))
        work += self._prompt_pieces(beside if work else self._prefill_chunk)
        if len(self._preempted) > preempted:
            # A prompt that arrived earlier may have preempted a sequence whose work was planned already.
            still_here = {id(running.sequence) for running in self._running}
            work = [item for item in work if id(item.sequence) in still_here]
        for item in work:
            sequence = item.sequence
            if item.sample:
                end = item.start + len(item.token_ids) + len(sequence.draft_ids)
                if end + self._lookahead > len(sequence.pages) * PAGE:
                    self._look_ahead(sequence, end)
        return [self._with_drafts(item) if item.sequence.draft_ids else item for item in work]

    def commit(self, work: Work, sample: TokenSample | None, accepted: Ids[TokenSample] = ()) -> None:
        """Record that a work item was done.

        Args:
            work: the item.
            sample: the last token it drew, if it had to draw.
            accepted: the tokens drawn before that one: the first draft tokens of the item, each drawn as guessed.
        """
        sequence = work.sequence
        assert work.start == sequence.n_cached, "work committed twice or out of order"
        if accepted:
            drafts = list(work.draft_ids[: len(accepted)])
            assert [one.token_id for one in accepted] == drafts, "not the drafts of this work"
            sequence.output_ids += drafts
        sequence.n_cached += len(work.token_ids) + len(accepted)
        sequence.state_place += 1 + len(accepted)
        if not work.decode:
            self._remember(sequence)
        if work.sample:
            assert sample is not None, "the runner drew no token"
            sequence.output_ids.append(sample.token_id)
            sequence.draft_ids = []

    def drop_checkpoint(self, action: SaveCheckpoint) -> None:
        """A state could not be kept: no prompt resumes from that entry."""
        self.blocks.drop_checkpoint(action.entry)

    def is_scored(self, request_id: int) -> bool:
        """Whether a running request that generates nothing has seen all of its prompt but the last token."""
        running = next(one for one in self._running if one.request.request_id == request_id)
        return running.sequence.n_cached >= len(running.request.prompt_ids) - 1

    def _release_copied(self) -> None:
        """Give back the pages that were held to be copied, once they have been."""
        if not self.actions:
            self.blocks.release(self._sources)
            self._sources = []

    # ---- who runs --------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give slots to preempted requests, then to waiting ones, as long as there are slots and pages."""
        while self._free_slots and self._preempted:
            running = self._preempted[0]
            # Room for the next page as well, or it would soon be preempted again.
            n_pages = page_count(running.sequence.n_cached)
            if not self.blocks.can_allocate(n_pages + 1) and not (
                not self._running and self.blocks.can_allocate(n_pages)
            ):
                return
            del self._preempted[0]
            running.sequence.slot = heapq.heappop(self._free_slots)
            running.sequence.pages = self.blocks.allocate(n_pages)
            sequence = running.sequence
            self.actions.append(
                LoadPages(sequence.request_id, sequence.slot, tuple(sequence.pages), self._place(sequence))
            )
            self._join(running)
        while self._free_slots and self._waiting and not self._preempted:
            arrival, request = self._waiting[0]
            shares_with = request.shares_with if self._prefix_cache else None
            if shares_with is not None and self._is_reading(shares_with):
                return  # the pages it shares are not there yet
            if not self._start(arrival, request):
                return
            self._waiting.popleft()

    def _start(self, arrival: int, request: Request) -> bool:
        """Give a request a slot and what the cache already holds of its prompt, if there is room for the rest of it."""
        prompt = request.prompt_ids
        # At least one token is computed, for what follows it; and every one whose successor is to be scored.
        most = len(prompt) - 1 if request.score_from is None else min(request.score_from - 1, len(prompt) - 1)
        prefix = self.blocks.find(prompt, most)
        self.blocks.hold(prefix.pages)
        needed = page_count(min(len(prompt) + 1, _longest(request))) - len(prefix.pages)
        if self._running and not self.blocks.can_allocate(needed):
            self.blocks.release(prefix.pages)
            return False
        pages, n_cached = list(prefix.pages), len(prefix.pages) * PAGE
        if prefix.source is not None:
            self.blocks.hold([prefix.source])
            if self.blocks.can_allocate(needed):
                pages += self.blocks.allocate(1)
                self.actions.append(CopyPage(request.request_id, prefix.source, pages[-1]))
                self._sources.append(prefix.source)
                n_cached += prefix.n_more
            else:
                self.blocks.release([prefix.source])
        slot = heapq.heappop(self._free_slots)
        if prefix.entry is not None:
            self.blocks.use_checkpoint(prefix.pages[-1])
            self.actions.append(RestoreCheckpoint(request.request_id, prefix.entry, slot, 0))
        sequence = ActiveSequence(request.request_id, slot, prompt, [], request.params, request.seed, n_cached, pages)
        sequence.cached_tokens, sequence.end, sequence.mask = n_cached, _longest(request), request.mask
        self._join(_Running(request, sequence, arrival))
        return True

    def _is_reading(self, request_id: int) -> bool:
        """Whether a request has started and not yet drawn its first token."""
        return any(
            one.request.request_id == request_id and not one.sequence.output_ids
            for one in (*self._running, *self._preempted)
        )

    def _join(self, running: _Running) -> None:
        running.seated = True
        self._running.append(running)
        self._running.sort(key=lambda one: one.arrival)

    def _close_ranks(self) -> None:
        """Move sequences to lower slots: the highest slot in use decides how many rows a step has (step_sizes)."""
        needed = next(size for size in self._step_sizes if size >= len(self._running))
        beyond = [one.sequence for one in self._running if one.sequence.slot >= needed]
        self._scattered = self._scattered + 1 if beyond else 0
        if self._scattered <= PATIENCE:
            return
        for sequence in beyond:
            old = sequence.slot
            heapq.heappush(self._free_slots, old)
            sequence.slot = heapq.heappop(self._free_slots)
            self.actions.append(LeaveSlot(sequence.request_id, old, sequence.slot, self._place(sequence)))

    def _leave(self, running: _Running) -> None:
        running.seated, sequence = False, running.sequence
        heapq.heappush(self._free_slots, sequence.slot)
        self.blocks.release(sequence.pages)
        sequence.pages = []

    def _preempt(self, running: _Running) -> None:
        """Take slot and pages from a sequence; it resumes later from where it is."""
        sequence = running.sequence
        self.n_preemptions += 1
        used = sequence.pages[: page_count(sequence.n_cached)]
        self.actions.append(SavePages(sequence.request_id, sequence.slot, tuple(used), self._place(sequence)))
        self._running.remove(running)
        self._leave(running)
        self._preempted.append(running)
        self._preempted.sort(key=lambda one: one.arrival)

    # ---- states ----------------------------------------------------------------------------------------------

    def _place(self, sequence: ActiveSequence) -> int | None:
        """The place of a sequence's state; None where it has none."""
        return sequence.state_place if self._stateful and sequence.n_cached else None

    def _border(self, prompt: Ids[int], start: int) -> int:
        """The next position behind `start` at which a piece of a prompt must end for a checkpoint."""
        if self._spacing is None:
            return len(prompt)
        last = (len(prompt) - 1) // PAGE * PAGE
        regular = (start // self._spacing + 1) * self._spacing
        return min(border for border in (regular, last) if border > start)

    def _remember(self, sequence: ActiveSequence) -> None:
        """A piece of a prompt has been computed: later prompts may use its pages, and its state where it is kept."""
        done, prompt = sequence.n_cached, sequence.prompt_ids
        # A page in part is of no use where the state at its last token is not kept.
        whole = done if done == len(prompt) and not self._stateful else done // PAGE * PAGE
        page = self.blocks.remember(sequence.pages, prompt[:whole])
        if self._spacing is None or page is None or done % PAGE:
            return
        if done % self._spacing == 0 or done == (len(prompt) - 1) // PAGE * PAGE:
            entry = self.blocks.add_checkpoint(page)
            if entry is not None:
                self.actions.append(SaveCheckpoint(sequence.request_id, sequence.slot, sequence.state_place, entry))

    # ---- pages -----------------------------------------------------------------------------------------------

    def _make_room(self, running: _Running, n_positions: int) -> bool:
        """Give a sequence pages for so many positions, preempting those that arrived after it where pages run out.

        False where there are too few even so; then it was mostly preempted itself.
        """
        if not running.seated:
            return False
        sequence = running.sequence
        missing = page_count(n_positions) - len(sequence.pages)
        while missing > 0 and not self.blocks.can_allocate(missing):
            if len(self._running) == 1:
                assert self._sources, "a request that fits the cache runs alone"
                return False  # until those pages have been copied
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is running:
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

    def _with_drafts(self, item: Work) -> Work:
        """The work with as many of its sequence's draft tokens as have pages and may be needed."""
        sequence, first = item.sequence, item.start + len(item.token_ids)
        room = len(sequence.pages) * PAGE if sequence.end is None else min(len(sequence.pages) * PAGE, sequence.end)
        return item._replace(draft_ids=tuple(sequence.draft_ids[: max(0, room - first)])) if item.decode else item

    # ---- prompts ---------------------------------------------------------------------------------------------

    def _prompt_pieces(self, budget: int) -> list[Work]:
        """Pieces of prompts in order of arrival, together at most `budget` tokens."""
        pieces: list[Work] = []
        for running in list(self._running):
            if budget == 0:
                break
            sequence = running.sequence
            if sequence.output_ids:
                continue
            work = self._next_piece(running, budget)
            if work is None:
                continue
            if not self._make_room(running, work.start + len(work.token_ids)):
                break  # this request was preempted itself; later ones cannot get pages either
            budget -= len(work.token_ids)
            pieces.append(work)
        return pieces

    def _next_piece(self, running: _Running, budget: int) -> Work | None:
        """The next piece of a prompt: pieces end with the budget, where scoring begins and ends, and at checkpoints."""
        request, sequence = running.request, running.sequence
        start, last = sequence.n_cached, len(sequence.prompt_ids) - 1
        end = min(last + 1, start + budget, self._border(sequence.prompt_ids, start))
        score = False
        if request.score_from is not None and start < last:
            first_scored = min(request.score_from - 1, last)
            score = start >= first_scored
            end = min(end, last if score else first_scored)
        if request.max_output == 0:
            end = min(end, last)
        if start >= end:
            return None
        ids: Ids[int] = sequence.prompt_ids[start:end]
        return Work(sequence, ids, start, end == last + 1, score)


def _longest(request: Request) -> int:
    """Positions that a request may come to need: its last token, generated or scored, is not fed."""
    return len(request.prompt_ids) + request.max_output - 1
