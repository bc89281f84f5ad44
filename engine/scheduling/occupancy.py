"""What an engine is doing at a moment, for monitoring. Integers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.scheduling.scheduler import Scheduler


@dataclass(frozen=True)
class SlotUse:
    """One sequence that holds a slot.

    Attributes:
        slot: the slot.
        request_id: the request it serves.
        prompt_tokens: tokens of the prompt.
        done_tokens: tokens of prompt and output whose keys and values are in the cache.
        cached_tokens: prompt tokens that were there when it started.
        output_tokens: tokens generated so far.
    """

    slot: int
    request_id: int
    prompt_tokens: int
    done_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Occupancy:
    """Counts of requests and pages.

    Attributes:
        slots: the sequences that hold a slot, in order of arrival.
        waiting: requests that have not started.
        preempted: requests that have started and wait to go on.
        preemptions: how often a sequence was preempted since the model was opened.
        pages: pages of the cache.
        held_pages: pages that sequences hold.
    """

    slots: tuple[SlotUse, ...]
    waiting: int
    preempted: int
    preemptions: int
    pages: int
    held_pages: int

    @classmethod
    def of(cls, scheduler: Scheduler) -> Occupancy:
        """That of a scheduler; to be called between its plans."""
        return cls(
            slots=tuple(
                SlotUse(
                    slot=one.slot,
                    request_id=one.request_id,
                    prompt_tokens=len(one.prompt_ids),
                    done_tokens=one.n_cached,
                    cached_tokens=one.cached_tokens,
                    output_tokens=len(one.output_ids),
                )
                for one in scheduler.sequences()
            ),
            waiting=scheduler.n_waiting,
            preempted=scheduler.n_preempted,
            preemptions=scheduler.n_preemptions,
            pages=scheduler.blocks.n_pages,
            held_pages=scheduler.blocks.n_pages - scheduler.blocks.n_available,
        )
