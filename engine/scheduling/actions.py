"""What a plan wants done to the cache before its step: copies, moves and savings, as data. Integers only.

Doing one twice in a row changes nothing, so one that was cut short is done again.
"""

from __future__ import annotations

from dataclasses import dataclass


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
