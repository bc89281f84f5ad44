"""What prompts share in the cache: pages that a later prompt begins with, and recurrent states at their ends.

Integers only. What must happen on the device is appended to the actions of the scheduler. An exception may arrive
between any two lines (docs/decisions/exceptions-at-any-line.md): what is held here follows from the actions.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.config import PAGE, page_count
from engine.request import ActiveSequence, Request
from engine.scheduling.actions import Action, CopyPage, SaveCheckpoint
from engine.scheduling.page_pool import PagePool
from engine.scheduling.pieces import Spacing, longest


@dataclass(frozen=True)
class Claim:
    """What a request begins with.

    Attributes:
        pages: that it holds: those it shares, and the copy of the one in which it continues differently.
        n_cached: positions of them that it need not compute.
        entry: the checkpoint that its recurrent state is restored from; None where there is none.
        parts_at: see ActiveSequence.
    """

    pages: list[int]
    n_cached: int
    entry: int | None
    parts_at: int = 0


class Prefixes:
    """Pages and states that requests find, and those that they leave for later ones.

    Args:
        blocks: the pages.
        actions: of the scheduler.
        spacing: at which positions of a prompt states are kept.
        stateful: whether the model has recurrent layers.

    Attributes:
        sources: pages held until they have been copied.
    """

    def __init__(self, blocks: PagePool, actions: deque[Action], spacing: Spacing, *, stateful: bool) -> None:
        self.sources: list[int] = []
        self._blocks = blocks
        self._actions = actions
        self._spacing = spacing
        self._stateful = stateful

    def claim(self, request: Request, *, alone: bool) -> Claim | None:
        """Hold what the cache has of a prompt; None where there is no room for the rest of it.

        Args:
            request: the request.
            alone: no sequence runs that could make room by ending.
        """
        blocks, prompt = self._blocks, request.prompt_ids
        # At least one token is computed, for what follows it; and every one whose successor is to be scored.
        most = len(prompt) - 1 if request.score_from is None else min(request.score_from - 1, len(prompt) - 1)
        prefix = blocks.find(prompt, most)
        blocks.hold(prefix.pages)
        needed = page_count(min(len(prompt) + 1, longest(request))) - len(prefix.pages)
        if not blocks.can_allocate(needed) and not alone:
            blocks.release(prefix.pages)
            return None
        pages, n_cached = list(prefix.pages), len(prefix.pages) * PAGE
        if prefix.source is not None:
            blocks.hold([prefix.source])
            if blocks.can_allocate(needed):
                pages += blocks.allocate(1)
                self._actions.append(CopyPage(request.request_id, prefix.source, pages[-1]))
                self.sources.append(prefix.source)
                n_cached += prefix.n_more
            else:
                blocks.release([prefix.source])
        if prefix.entry is not None:
            blocks.use_checkpoint(prefix.pages[-1])
        return Claim(pages, n_cached, prefix.entry, prefix.parts_at)

    def remember(self, sequence: ActiveSequence) -> None:
        """A piece of a prompt has been computed: later prompts may use its pages, and its state where it is kept."""
        done, prompt = sequence.n_cached, sequence.prompt_ids
        # A page in part is of no use where the state at its last token is not kept.
        whole = done if done == len(prompt) and not self._stateful else done // PAGE * PAGE
        page = self._blocks.remember(sequence.pages, prompt[:whole])
        if page is None or not self._spacing.keeps(prompt, done, sequence.parts_at):
            return
        entry = self._blocks.checkpoint_entry(page)
        if entry is not None:
            # In this order: an entry that can be found will have been written.
            self._actions.append(SaveCheckpoint(sequence.request_id, sequence.slot, sequence.state_place, entry))
            self._blocks.add_checkpoint(page, entry)

    def release_copied(self) -> None:
        """Give back the pages that were held to be copied, once they have been."""
        if self.sources and not self._actions:
            sources, self.sources = self.sources, []
            self._blocks.release(sources)

    def recover(self) -> None:
        """Make `sources` follow from the actions again."""
        self.sources = [action.source for action in self._actions if isinstance(action, CopyPage)]
