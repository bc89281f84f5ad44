"""One pool of threads for the CPU kernels, and how many threads to use on this machine.

The pool runs numbered tasks; the calling thread takes its share. Idle threads sleep. It knows nothing of what the
tasks compute; tasks run in parallel because compiled kernels release the GIL.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Self

from engine.errors import InvalidRequestError

MAX_THREADS = 1024

_pools: "weakref.WeakSet[ThreadPool]" = weakref.WeakSet()


class _Job:
    """Numbered tasks that any thread may help with. Counters are atomic because of the GIL."""

    def __init__(self, task: Callable[[int], None], n_tasks: int) -> None:
        self.task = task
        self.n_tasks = n_tasks
        self.cancelled = False
        self.helpers: list[int] = []  # threads of the pool that are running its tasks
        self.error: BaseException | None = None
        self.finished = threading.Lock()
        self.finished.acquire()
        self._next = count()
        self._done = count(1)

    def help(self) -> None:
        """Takes tasks until none is left; the thread that ends the last one releases `finished`."""
        for index in self._next:
            if index >= self.n_tasks:
                return
            if not self.cancelled:
                try:
                    self.task(index)
                except Exception as error:
                    self.error = self.error or error
                    self.cancelled = True
            if next(self._done) == self.n_tasks:
                self.finished.release()


def _serve(jobs: "SimpleQueue[_Job | None]") -> None:
    while True:
        job = jobs.get()
        if job is None:
            return
        job.helpers.append(threading.get_ident())  # before help() looks whether the job was cancelled
        try:
            job.help()
        finally:
            job.helpers.remove(threading.get_ident())
        # A sleeping thread must not keep the arrays of its last job alive.
        del job


class ThreadPool:
    """Runs numbered tasks on `threads` threads, the caller included.

    Threads start with the first parallel job and again after a fork. Several threads may call `run` at the same time,
    and a task may call it. After `close` everything runs on the calling thread.

    Args:
        threads: number of threads; None means `default_threads()`.

    Raises:
        InvalidRequestError: threads is not between 1 and 1024.
    """

    def __init__(self, threads: int | None = None) -> None:
        if threads is None:
            threads = default_threads()
        if not 1 <= threads <= MAX_THREADS:
            raise InvalidRequestError(f"threads must be between 1 and {MAX_THREADS}, not {threads}")
        self.threads = threads
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._helpers: list[threading.Thread] = []
        self._closed = False
        self._finalizer: weakref.finalize[..., ThreadPool] | None = None
        _pools.add(self)

    def run(self, task: Callable[[int], None], n_tasks: int) -> None:
        """Calls task(0) .. task(n_tasks - 1), each once, in any order and on any thread; returns when all are done.

        When an exception leaves this function (an interrupt included), none of them is still running.

        Raises:
            Exception: the first exception a task raised; tasks not yet begun are then skipped.
        """
        helpers = min(self.threads, n_tasks) - 1
        if helpers <= 0 or self._closed:
            for index in range(n_tasks):
                task(index)
            return
        if not self._helpers:
            self._start()
        job = _Job(task, n_tasks)
        for _ in range(helpers):
            self._jobs.put(job)
        try:
            job.help()
            job.finished.acquire()
        except BaseException:
            # Ctrl-C: helpers stop after the task they are in. Until then that task writes to buffers and cache pages,
            # which the caller's next step may give to another sequence.
            job.cancelled = True
            while job.helpers:
                time.sleep(0.0002)
            raise
        if job.error is not None:
            raise job.error

    def close(self) -> None:
        """Ends the threads; safe to call twice."""
        self._closed = True
        with self._lock:
            helpers, self._helpers = self._helpers, []
        if self._finalizer is not None:
            self._finalizer()
        for helper in helpers:
            if helper is not threading.current_thread():
                helper.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        with self._lock:
            if self._helpers or self._closed:
                return
            # The threads hold the queue, not the pool, so a forgotten pool is collected and its threads end.
            self._finalizer = weakref.finalize(self, _stop, self._jobs, self.threads - 1)
            helpers = [
                threading.Thread(target=_serve, args=(self._jobs,), name=f"gguf-engine-cpu-{index + 1}", daemon=True)
                for index in range(self.threads - 1)
            ]
            for helper in helpers:
                helper.start()
            self._helpers = helpers

    def _forget_threads(self) -> None:
        """In the child of a fork only the forking thread exists; locks may be in any state."""
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        self._lock = threading.Lock()
        self._jobs = SimpleQueue()
        self._helpers = []


def _stop(jobs: "SimpleQueue[_Job | None]", n_threads: int) -> None:
    for _ in range(n_threads):
        jobs.put(None)


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool._forget_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


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
