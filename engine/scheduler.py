"""Which sequences run in the next step, and in which cache slot. Integers only: no arrays, no devices, no text.

Every step feeds one token of each decoding sequence and, within a budget, chunks of the prompts that are still being
read, so that a long prompt slows the running streams down but never stops them. Requests start in order of arrival.
The chunks of a prompt are cut at fixed places, whoever else is running.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.request import Request, Sequence, TokenSample, Work


@dataclass
class _Running:
    request: Request
    sequence: Sequence


class Scheduler:
    """Waiting and running requests, and the free slots.

    Args:
        max_sequences: number of cache slots.
        prefill_chunk: most prompt tokens in one step.
    """

    def __init__(self, max_sequences: int, prefill_chunk: int = 512) -> None:
        self.prefill_chunk = prefill_chunk
        self._waiting: deque[Request] = deque()
        self._running: dict[int, _Running] = {}
        self._free = list(range(max_sequences))[::-1]

    @property
    def n_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request behind those that wait."""
        assert request.prompt_ids, "an empty prompt must be refused before"
        self._waiting.append(request)

    def remove(self, request_id: int) -> int | None:
        """Forget a request, finished or not; returns the slot it held, None where it held none."""
        running = self._running.pop(request_id, None)
        if running is not None:
            self._free.append(running.sequence.slot)
            return running.sequence.slot
        self._waiting = deque(request for request in self._waiting if request.request_id != request_id)
        return None

    def plan(self) -> list[Work]:
        """Admit what fits and say what to feed next; [] when nothing is left to do."""
        while self._waiting and self._free:
            request = self._waiting.popleft()
            sequence = Sequence(
                request.request_id, self._free.pop(), request.prompt_ids, [], request.params, request.seed
            )
            self._running[request.request_id] = _Running(request, sequence)
        decode: list[Work] = []
        prefill: list[Work] = []
        budget = self.prefill_chunk
        for running in self._running.values():
            sequence = running.sequence
            if sequence.output_ids:
                start = sequence.n_cached
                decode.append(Work(sequence, sequence.output_ids[start - len(sequence.prompt_ids) :], start, True))
                continue
            work = self._next_chunk(running)
            if work is not None and len(work.token_ids) <= budget:
                budget -= len(work.token_ids)
                prefill.append(work)
            elif work is not None:
                budget = 0  # later arrivals do not overtake
        return decode + prefill

    def _next_chunk(self, running: _Running) -> Work | None:
        """The next piece of a prompt: pieces end at multiples of the chunk and where scoring begins and ends."""
        request, sequence = running.request, running.sequence
        start, last = sequence.n_cached, len(sequence.prompt_ids) - 1
        end = min(last + 1, (start // self.prefill_chunk + 1) * self.prefill_chunk)
        score = False
        if request.score_from is not None and start < last:
            first_scored = min(request.score_from - 1, last)
            score = start >= first_scored
            end = min(end, last if score else first_scored)
        if request.max_output == 0:
            end = min(end, last)
        if start >= end:
            return None
        return Work(sequence, sequence.prompt_ids[start:end], start, end == last + 1, score)

    def commit(self, work: Work, sample: TokenSample | None) -> None:
        """Record that a work item was done; sample is the token it drew, if it had to."""
        sequence = work.sequence
        assert work.start == sequence.n_cached, "work committed twice or out of order"
        sequence.n_cached += len(work.token_ids)
        if work.sample:
            assert sample is not None, "the runner drew no token"
            sequence.output_ids.append(sample.token_id)

    def is_scored(self, request_id: int) -> bool:
        """Whether a running request that generates nothing has seen all of its prompt but the last token."""
        running = self._running[request_id]
        return running.sequence.n_cached >= len(running.request.prompt_ids) - 1
