"""How requests are cut into work items: pieces of prompts and of forced tokens, borders of checkpoints, draft tokens.

Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass

from engine.config import PAGE, STATE_BORDER, piece_end
from engine.request import ActiveSequence, Request, Work


@dataclass(frozen=True)
class Spacing:
    """At which positions of a prompt the recurrent state is kept.

    Multiples of `every`, its last page border, and the one at which it parts from an earlier prompt: what two prompts
    begin with, a third one may begin with as well.

    Attributes:
        every: a multiple of PAGE; None where no states are kept.
        stateful: whether the model has recurrent states, kept or not.
    """

    every: int | None
    stateful: bool

    @property
    def pieces(self) -> int:
        """Pieces end at multiples of it."""
        return STATE_BORDER if self.stateful else 1

    def border(self, prompt: Ids[int], start: int, parts_at: int = 0) -> int:
        """The next position behind `start` at which a piece of a prompt must end. parts_at: see ActiveSequence."""
        if self.every is None:
            return len(prompt)
        last = (len(prompt) - 1) // PAGE * PAGE
        regular = (start // self.every + 1) * self.every
        return min(border for border in (regular, last, parts_at) if border > start)

    def keeps(self, prompt: Ids[int], done: int, parts_at: int = 0) -> bool:
        """Whether the state after `done` tokens of a prompt is kept."""
        if self.every is None or done % PAGE:
            return False
        return done % self.every == 0 or done in (parts_at, (len(prompt) - 1) // PAGE * PAGE)


def longest(request: Request) -> int:
    """Positions that a request may come to need: its last token, generated or scored, is not fed."""
    return len(request.prompt_ids) + request.max_output - 1


def outputs_before(work: Work) -> int:
    """Tokens that its sequence had generated before a work item that draws."""
    n = work.start + len(work.token_ids) - len(work.sequence.prompt_ids)
    return n if n > 0 else 0


def next_piece(request: Request, sequence: ActiveSequence, budget: int, spacing: Spacing) -> Work | None:
    """The next piece of a prompt or of forced tokens; None where there is nothing to feed.

    Pieces end with the budget; those of a prompt also where scoring begins and ends, and at checkpoints.
    """
    start, last, prompt = sequence.n_cached, sequence.pieces_end - 1, sequence.prompt_ids
    end = piece_end(start, start + budget, last + 1, spacing.pieces)
    if start >= end:
        return None
    if start >= len(prompt):
        ids: Ids[int] = sequence.output_ids[start - len(prompt) : end - len(prompt)]
        return Work(sequence, ids, start, end == last + 1)
    end = min(end, spacing.border(prompt, start, sequence.parts_at))
    score = False
    if request.score_from is not None and start < last:
        first_scored = min(request.score_from - 1, last)
        score = start >= first_scored
        end = min(end, last if score else first_scored)
    if request.max_output == 0:
        end = min(end, last)
    if start >= end:
        return None
    return Work(sequence, prompt[start:end], start, end == last + 1, score)


def with_drafts(item: Work) -> Work:
    """The work with as many of its sequence's draft tokens as have pages and may be needed."""
    sequence, first = item.sequence, item.start + len(item.token_ids)
    room = len(sequence.pages) * PAGE if sequence.end is None else min(len(sequence.pages) * PAGE, sequence.end)
    return item._replace(draft_ids=tuple(sequence.draft_ids[: max(0, room - first)])) if item.decode else item
