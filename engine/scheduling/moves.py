"""Carries out on the runner what a plan wants done to the cache before its step."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from engine.runner.protocol import Runner
from engine.scheduling.actions import (
    Action,
    CopyPage,
    LeaveSlot,
    LoadPages,
    RestoreCheckpoint,
    SaveCheckpoint,
    SavePages,
)
from engine.scheduling.failures import Failures
from engine.scheduling.job import Job


class Moves:
    """Actions on a runner.

    Args:
        runner: the model on its device.
        failures: says which exceptions are those of an action.

    Attributes:
        lost: actions that failed, with the reason, until the loop has told it.
    """

    def __init__(self, runner: Runner, failures: Failures) -> None:
        self._runner = runner
        self._failures = failures
        self.lost: list[tuple[Action, Exception]] = []

    def carry_out(self, actions: deque[Action], jobs: Mapping[int, Job]) -> None:
        """Do all actions in order. One that was cut short is done again, which changes nothing.

        One that fails is not tried again. It ends the request it was for, unless that can go on without it.
        """
        while actions:
            action = actions[0]
            unwritten = self._unwritten(action)
            if unwritten is not None:
                self.lost.append((action, unwritten))
            else:
                try:
                    self._move(action, jobs.get(action.request_id))
                except Exception as error:
                    if not self._failures.is_own(error):
                        raise
                    self.lost.append((action, error))
            actions.popleft()

    def _unwritten(self, action: Action) -> Exception | None:
        """Why the entry that an action reads was not written."""
        if isinstance(action, RestoreCheckpoint):
            for lost, error in self.lost:
                if isinstance(lost, SaveCheckpoint) and lost.entry == action.entry:
                    return error
        return None

    def _move(self, action: Action, job: Job | None) -> None:
        runner, states = self._runner, self._runner.states
        if isinstance(action, CopyPage):
            runner.copy_pages([(action.source, action.target)])
        elif isinstance(action, LeaveSlot):
            runner.release(action.slot)
            if states is not None and action.place is not None:
                states.move(action.slot, action.target, action.place)
        elif isinstance(action, SaveCheckpoint):
            assert states is not None
            states.checkpoint(action.slot, action.place, action.entry)
        elif isinstance(action, RestoreCheckpoint):
            assert states is not None
            states.restore(action.entry, action.slot, action.place)
        else:
            self._move_out_or_in(action, job)

    def _move_out_or_in(self, action: SavePages | LoadPages, job: Job | None) -> None:
        """What a preempted sequence has in the cache leaves it or comes back; the job is None where it was given up."""
        runner, states = self._runner, self._runner.states
        if isinstance(action, SavePages):
            runner.release(action.slot)
            if job is not None:
                job.saved = runner.save_pages(action.pages)
                if states is not None and action.place is not None:
                    job.saved_state = states.save(action.slot, action.place)
        elif job is not None:
            runner.load_pages(job.saved, action.pages)
            if states is not None and action.place is not None:
                states.load(job.saved_state, action.slot, action.place)
