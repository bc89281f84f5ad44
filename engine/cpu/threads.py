"""One pool of threads for the CPU kernels, and how many threads to use on this machine.

The pool runs numbered tasks; the calling thread takes its share. Idle threads sleep. Tasks run in parallel because
compiled kernels release the GIL.
"""

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Self

from engine.concurrency import fork
from engine.concurrency.turn import WAIT_SECONDS, Hold, Turn
from engine.cpu.reused_memory import ReusedMemory
from engine.errors import InvalidRequestError

MAX_THREADS = 1024


class _Job:
    """Numbered tasks that any thread may help with. Counters are atomic because of the GIL.

    Attributes:
        stopped: no further task is begun.
        helpers: holds of the pool's threads that are in it.
        error: what made a task fail on one of them.
    """

    def __init__(self, task: Callable[[int], None], n_tasks: int, caller: Hold) -> None:
        self.caller = caller
        self.stopped = False
        self.helpers: list[Hold] = []
        self.error: BaseException | None = None
        self._task = task
        self._n_tasks = n_tasks
        self._next = count()
        self._left: SimpleQueue[None] = SimpleQueue()

    def work(self) -> None:
        """Do tasks until none is left."""
        for index in self._next:
            if index >= self._n_tasks or self.stopped:
                return
            self._task(index)

    def help(self) -> None:
        """work() on a thread of the pool."""
        hold = Hold()
        try:
            self.helpers.append(hold)  # before work() looks whether the job was stopped
            self.work()
            hold.released = True
        except BaseException as error:
            self.error = self.error or error
            self.stopped = True
        finally:
            self.helpers.remove(hold)
            self._left.put(None)

    def finish(self) -> None:
        """Begin no further task, and wait until the pool's threads have ended those that they are in."""
        self.stopped = True
        while self.helpers:
            try:
                self._left.get(timeout=WAIT_SECONDS)
            except Empty:
                self._drop_gone()

    def _drop_gone(self) -> None:
        """Drop helpers that an exception removed from the job before they could say so."""
        for helper in tuple(self.helpers):
            if not helper.is_running():
                if not helper.released and self.error is None:
                    self.error = RuntimeError("a thread of the pool was interrupted in the middle of a task")
                with suppress(ValueError):
                    self.helpers.remove(helper)


def _serve(jobs: "SimpleQueue[_Job | None]") -> None:
    while True:
        try:
            job = jobs.get()
            if job is None:
                jobs.put(None)  # for the next thread
                return
            job.help()
        except BaseException:  # raised into this thread from outside; the job has recorded it, or had not begun
            continue
        finally:
            # A sleeping thread must not hold references to the arrays of its last job.
            job = None


class ThreadPool:
    """Runs numbered tasks on `threads` threads, the caller included.

    Threads start with the first parallel job and again after a fork. Several threads may call `run` at the same time,
    and a task may call it. After `close` everything runs on the calling thread.

    Args:
        threads: number of threads; None means `default_threads()`.

    Attributes:
        memory: for what tasks write.

    Raises:
        InvalidRequestError: threads is not between 1 and 1024.
    """

    def __init__(self, threads: int | None = None) -> None:
        if threads is None:
            threads = default_threads()
        if not 1 <= threads <= MAX_THREADS:
            raise InvalidRequestError(f"threads must be between 1 and {MAX_THREADS}, not {threads}")
        self.threads = threads
        self.memory = ReusedMemory()
        self._starting = Turn()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._open: list[_Job] = []  # of calls of run() that have not returned
        self._helpers: list[threading.Thread] = []
        self._closed = False
        self._finalizer: weakref.finalize[Any, Any] | None = None
        fork.register(self)

    def run(self, task: Callable[[int], None], n_tasks: int) -> None:
        """Calls task(0) .. task(n_tasks - 1), each once, in any order and on any thread; returns when all are done.

        When it raises, none of them is running any more, wherever on this thread the exception arrived.

        Raises:
            Exception: the first exception a task raised; tasks not yet begun are then skipped.
        """
        helpers = min(self.threads, n_tasks) - 1
        if helpers <= 0 or self._closed:
            for index in range(n_tasks):
                task(index)
            return
        if len(self._helpers) < self.threads - 1:
            self._start()
        hold = Hold()
        job = _Job(task, n_tasks, hold)
        # The second finish() is for an exception that arrives in the first: a task that still ran would write to
        # buffers and cache pages that the next step uses for other sequences.
        try:
            try:
                self._open.append(job)
                for _ in range(helpers):
                    self._jobs.put(job)
                job.work()
            finally:
                job.finish()
        finally:
            job.finish()
            if job in self._open:
                self._open.remove(job)
        if job.error is not None:
            if isinstance(job.error, Exception):
                raise job.error
            raise RuntimeError("a thread of the pool was interrupted in the middle of a task") from job.error

    def settle(self) -> None:
        """Wait for what is left of jobs whose call of run() was cut short again and again while it waited for them."""
        for job in tuple(self._open):
            if not job.caller.is_running():
                job.finish()
                with suppress(ValueError):
                    self._open.remove(job)

    def close(self) -> None:
        """Ends the threads; safe to call twice."""
        self._closed = True
        self.memory.clear()
        self._jobs.put(None)
        if self._finalizer is not None:
            self._finalizer.detach()
        while self._helpers:
            if self._helpers[-1] is not threading.current_thread():
                self._helpers[-1].join()
            self._helpers.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        hold = Hold()
        self._starting.wait(hold)
        try:
            if self._closed:
                return
            if self._finalizer is None:
                # The threads hold the queue, not the pool, so a forgotten pool is collected and its threads end.
                self._finalizer = weakref.finalize(self, self._jobs.put, None)
            while len(self._helpers) < self.threads - 1:
                name = f"gguf-engine-cpu-{len(self._helpers) + 1}"
                helper = threading.Thread(target=_serve, args=(self._jobs,), name=name, daemon=True)
                helper.start()
                self._helpers.append(helper)
        finally:
            self._starting.release(hold)

    def after_fork(self) -> None:
        """In the child only the forking thread exists: threads start again, and jobs that they were in are dropped."""
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        self._starting = Turn()
        self._jobs = SimpleQueue()
        self._helpers = []
        for job in self._open:
            job.stopped = True
            job.helpers = []
            job.error = RuntimeError("this process was forked in the middle of a task")
        self._open = [job for job in self._open if job.caller.is_running()]


def default_threads(system: Path = Path("/")) -> int:
    """Physical cores this process may use: its affinity mask, limited by the CPU quota of its control group.

    Two hardware threads of one core share its arithmetic units, so a second one per core gains nothing here.

    Args:
        system: root of the /sys and /proc trees (tests pass a folder).
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = _physical_cores(allowed, system)
    quota = _cpu_quota(system)
    return max(1, cores if quota is None else min(cores, round(quota)))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _physical_cores(cpus: set[int], system: Path) -> int:
    cores = set()
    for cpu in cpus:
        topology = system / "sys/devices/system/cpu" / f"cpu{cpu}" / "topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        cores.add(siblings or str(cpu))
    return max(1, len(cores))


def _cpu_quota(system: Path) -> float | None:
    """CPUs granted by the tightest control group (version 2 or 1) above this process; None is no limit."""
    limits = []
    root = system / "sys/fs/cgroup"
    for line in (_read(system / "proc/self/cgroup") or "0::/").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            base = root
        elif "cpu" in controllers.split(","):
            base = root / "cpu"
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            limits.extend(_group_limit(group))
            if group == base:
                break
    return min(limits, default=None)


def _group_limit(group: Path) -> list[float]:
    unified = _read(group / "cpu.max")
    if unified is not None:
        fields = unified.split()
    else:
        fields = [_read(group / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    # "max" (version 2) and -1 (version 1) mean no limit.
    if len(fields) != 2 or not all(field.isdigit() and int(field) for field in fields):
        return []
    return [int(fields[0]) / int(fields[1])]
