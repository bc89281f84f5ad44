"""What step() has told of the requests that were made for it: their chunks, then perhaps what ended them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.request import StreamChunk
from engine.scheduling.job import Job


class Told:
    """The jobs whose chunks step() returns, and how many of each it has returned."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._n: dict[int, int] = {}  # chunks told, by request; a new dict for each step
        self._returned: list[StreamChunk] = []  # that an exception kept from their caller
        self._failed: Job | None = None  # whose failure was raised last

    def watch(self, job: Job) -> None:
        """Tell of a job from now on."""
        self._jobs[job.request.request_id] = job

    def forget_over(self, alive: Mapping[int, Job]) -> None:
        """Drop the ended jobs of which everything has been told; `alive` are those that have not ended."""
        over = self._jobs.keys() - alive.keys()
        told = {i for i in over if self._jobs[i].error is None and self._n.get(i) == len(self._jobs[i].chunks)}
        if told:
            self._jobs = {i: job for i, job in self._jobs.items() if i not in told}

    def raise_failure(self) -> None:
        """Raise what ended one job whose chunks have all been told; once.

        Raises:
            Exception: that, with an attribute `request_id`.
        """
        self._failed = None
        for request_id, job in self._jobs.items():
            if job.error is not None and self._n.get(request_id, 0) == len(job.chunks):
                job.error.request_id = request_id  # type: ignore[attr-defined]
                self._failed = job  # before it is forgotten: see give_back()
                self._jobs = {i: other for i, other in self._jobs.items() if other is not job}
                raise job.error

    def collect(self, chunks: list[StreamChunk]) -> None:
        """Put the chunks not told yet into an empty list; raises a failure where there are none."""
        before, told = self._n, {}
        n_returned = len(self._returned)
        new = self._returned[:n_returned]
        for request_id, job in self._jobs.items():
            told[request_id] = job.chunks.tell(before.get(request_id, 0), new)
        if not new:
            self.raise_failure()
        # Plain stores, between which nothing can come.
        chunks[:], self._n, self._returned[:n_returned] = new, told, ()

    def give_back(self, chunks: Sequence[StreamChunk], error: BaseException) -> None:
        """The caller got an exception instead of these, or of a failure: the next call tells them."""
        if self._failed is not None and self._failed.error is not error:
            self.watch(self._failed)
        self._returned += chunks
