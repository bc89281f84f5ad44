"""One thread that steps a model and puts what its steps bring into the mailboxes of event loops (mailbox.py).

The thread only calls LLM.step(); which request runs when is decided by the scheduler alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

from engine.api.asynchronous.mailbox import Mailbox, News, PromptProgress, Receiver
from engine.api.llm import LLM
from engine.concurrency import fork
from engine.errors import DeviceError, EngineError, copy_error
from engine.request import Request, StreamChunk
from engine.scheduling.job import Job

log = logging.getLogger("engine")

FEW = 4
"""Requests up to which the next step waits until a first chunk has been passed on. Of more, each waits for the others'
steps far longer than for this."""


class Driver:
    """Steps a model in a thread of its own while there are requests.

    Args:
        llm: the open model; others may use it at the same time.

    Attributes:
        failure: the error of the last step, where the device failed; None once a step has worked again.
        n_steps: steps so far that gave tokens.
        n_tokens: tokens that they gave.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._receivers: dict[int, tuple[Receiver, Mailbox]] = {}
        self._mailboxes: dict[int, Mailbox] = {}
        self._silent: set[int] = set()  # requests that have got no chunk yet
        self._changed = threading.Condition(threading.Lock())
        self._closed = False
        self.failure: DeviceError | None = None
        self.n_steps = self.n_tokens = 0
        self._watched: dict[int, float] = {}  # requests whose prompts are followed, and when they were first seen
        self._thread = self._start()
        fork.register(self)

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="gguf-engine driver", daemon=True)
        thread.start()
        return thread

    def after_fork(self) -> None:
        """In the child of a fork: no thread steps, and the requests are the parent's. The next request starts one."""
        self._changed = threading.Condition(threading.Lock())
        receivers, self._receivers = self._receivers, {}
        self._mailboxes, self._watched, self._silent = {}, {}, set()
        for receiver, _ in receivers.values():  # no loop is told: in the child none of them runs
            receiver.receive(EngineError("this process was forked while this request was running; make it again"))

    @property
    def n_requests(self) -> int:
        """Requests whose end has not been told yet."""
        return len(self._receivers)

    def mailbox(self, loop: asyncio.AbstractEventLoop) -> Mailbox:
        """The mailbox of an event loop."""
        with self._changed:
            for key in [key for key, box in self._mailboxes.items() if box._loop.is_closed()]:
                del self._mailboxes[key]
            return self._mailboxes.setdefault(id(loop), Mailbox(loop))

    def add(
        self,
        jobs: list[Job],
        receivers: Sequence[Receiver],
        mailbox: Mailbox,
        *,
        watched: bool = False,
    ) -> list[Request]:
        """Queue requests, one for each receiver.

        Args:
            jobs: what LLM.jobs() gives.
            receivers: get the news.
            mailbox: of their event loop.
            watched: tell the first one how its prompt is read.

        Raises:
            EngineError: the model is closed; nothing was queued.
        """
        with self._changed:  # held until the receivers are known: a step may bring the first chunk at once
            if self._closed:
                raise EngineError("the model is closed; open it again")
            if not self._thread.is_alive():  # it stayed in the process that this one was forked from
                self._thread = self._start()
            requests = self._llm.submit(jobs)
            for request, receiver in zip(requests, receivers, strict=True):
                self._receivers[request.request_id] = receiver, mailbox
                self._silent.add(request.request_id)
            if watched:
                self._watched[requests[0].request_id] = 0.0
            self._changed.notify()
        return requests

    def cancel(self, request_id: int) -> None:
        """End a request before the next step; its last chunk says "cancelled". Takes no lock."""
        self._llm.cancel(request_id)

    def close(self) -> None:
        """End all requests with an error and the thread; waits for a running step. The model stays open."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._receivers and not self._closed:
                    self._changed.wait()
                if self._closed:
                    break
            try:
                chunks = self._llm.step()
            except Exception as error:
                self._tell_failure(error)
                continue
            if self._watched:
                self._tell_progress()
            if chunks:
                self.failure = None
                self.n_steps += 1
                self.n_tokens += len(chunks)
                self._hand_out(chunks)
            elif self._llm.active_requests == 0:
                self._tell_lost()
        with self._changed:
            for request_id in self._receivers:
                self._llm.cancel(request_id)
            self._end_all(EngineError("the model was closed while this request was running"))

    def _hand_out(self, chunks: Sequence[StreamChunk]) -> None:
        posts: dict[Mailbox, list[tuple[Receiver, News]]] = {}
        urgent: set[Mailbox] = set()
        first: set[Mailbox] = set()
        with self._changed:
            for chunk in chunks:
                ended = chunk.finish_reason is not None
                found = (self._receivers.pop if ended else self._receivers.get)(chunk.request_id, None)
                if found is None:  # another user of the model made it with add_request()
                    continue
                posts.setdefault(found[1], []).append((found[0], chunk))
                if ended or chunk.request_id in self._silent:
                    urgent.add(found[1])
                    if not ended:
                        first.add(found[1])
                    self._silent.discard(chunk.request_id)
        for mailbox, news in posts.items():
            mailbox.post(news, at_once=mailbox in urgent)
            if mailbox in first and len(self._receivers) <= FEW:
                mailbox.wait()

    def _tell_progress(self) -> None:
        """How far the watched prompts have been read; called before their first tokens are told."""
        now, slots = time.perf_counter(), {slot.request_id: slot for slot in self._llm.occupancy().slots}
        with self._changed:
            for request_id, since in list(self._watched.items()):
                slot, found = slots.get(request_id), self._receivers.get(request_id)
                if found is None:
                    del self._watched[request_id]
                elif slot is not None:  # else it waits, or its only token has ended it
                    total, cached, done = slot.prompt_tokens, slot.cached_tokens, slot.done_tokens
                    news: list[tuple[Receiver, News]] = []
                    if not since:
                        self._watched[request_id] = since = now
                        news.append((found[0], PromptProgress(total, cached, cached, 0.0)))
                    if slot.output_tokens or done >= total:
                        done = total
                        del self._watched[request_id]
                    news.append((found[0], PromptProgress(total, cached, done, now - since)))
                    found[1].post(news, at_once=False)

    def _tell_failure(self, error: Exception) -> None:
        """A step raised: it ended the one request that the error names, or none that is known and then all."""
        if isinstance(error, DeviceError):
            self.failure = error
        request_id = getattr(error, "request_id", None)
        with self._changed:
            if request_id is None:
                log.error("a step failed outside any request: %s", error, exc_info=error)
                for known in self._receivers:
                    self._llm.cancel(known)
                self._end_all(error)
                return
            found = self._receivers.pop(request_id, None)
            self._silent.discard(request_id)
        if found is not None:
            found[1].post([(found[0], copy_error(error))])

    def _tell_lost(self) -> None:
        """No request is left in the engine: those that still wait were ended where their end could not be told."""
        chunks: list[StreamChunk] = []
        try:
            chunks = self._llm.step()  # what the last one brought while it was not looked at
        except Exception as error:
            self._tell_failure(error)
            return
        if chunks:
            self._hand_out(chunks)
        elif self._llm.active_requests == 0:
            with self._changed:
                self._end_all(EngineError("the request ended without a result"))

    def _end_all(self, error: Exception) -> None:
        """Tell every receiver an error; with the lock held."""
        receivers, self._receivers, self._silent = self._receivers, {}, set()
        for receiver, mailbox in receivers.values():
            mailbox.post([(receiver, copy_error(error))])
