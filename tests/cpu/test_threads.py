import gc
import os
import subprocess
import sys
import threading
import time

import pytest

from engine.cpu import threads as threads_module
from engine.cpu.threads import ThreadPool, default_threads
from engine.errors import InvalidRequestError


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("n_tasks", [0, 1, 2, 7, 100])
def test_every_task_runs_once(n_threads, n_tasks):
    seen = []
    with ThreadPool(n_threads) as pool:
        for _ in range(20):
            pool.run(seen.append, n_tasks)
    assert sorted(seen) == sorted(list(range(n_tasks)) * 20)


def test_tasks_run_on_several_threads():
    barrier = threading.Barrier(3, timeout=10)
    with ThreadPool(3) as pool:
        pool.run(lambda _: barrier.wait(), 3)


def test_an_exception_reaches_the_caller_and_the_pool_lives_on():
    def fail(index):
        raise KeyError(index)

    with ThreadPool(2) as pool:
        for _ in range(10):
            with pytest.raises(KeyError):
                pool.run(fail, 8)
        seen = []
        pool.run(seen.append, 8)
        assert sorted(seen) == list(range(8))


def test_an_interrupt_in_the_calling_thread_leaves_no_task_running():
    caller, at_work, running = threading.current_thread(), threading.Barrier(3, timeout=10), []

    def interrupted(index):
        if threading.current_thread() is caller:
            at_work.wait()
            raise KeyboardInterrupt
        running.append(index)
        at_work.wait()
        time.sleep(0.05)
        running.remove(index)

    with ThreadPool(3) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.run(interrupted, 3)
        assert running == []
        seen = []
        pool.run(seen.append, 8)
        assert sorted(seen) == list(range(8))


def test_nested_and_concurrent_runs():
    with ThreadPool(3) as pool:
        seen = []

        def outer(index):
            pool.run(lambda inner: seen.append((index, inner)), 5)

        callers = [threading.Thread(target=pool.run, args=(outer, 4)) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(10)
            assert not caller.is_alive()
    assert sorted(seen) == sorted([(i, j) for i in range(4) for j in range(5)] * 4)


def test_closed_pool_runs_on_the_caller_and_has_no_threads():
    before = threading.active_count()
    pool = ThreadPool(4)
    pool.run(lambda _: None, 8)
    assert threading.active_count() == before + 3
    pool.close()
    pool.close()
    assert threading.active_count() == before
    names = set()
    pool.run(lambda _: names.add(threading.current_thread().name), 8)
    assert names == {threading.current_thread().name}


def test_a_forgotten_pool_ends_its_threads():
    before = set(threading.enumerate())
    pool = ThreadPool(3)
    pool.run(lambda _: None, 4)
    # Threads of other tests may end meanwhile, so these are watched by themselves.
    workers = set(threading.enumerate()) - before
    assert len(workers) == 2
    del pool
    gc.collect()
    for worker in workers:
        worker.join(timeout=5)
    assert not any(worker.is_alive() for worker in workers)


def test_idle_threads_sleep():
    with ThreadPool(4) as pool:
        pool.run(lambda _: None, 8)
        start = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - start < 0.05


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_pool_works_in_the_child_of_a_fork():
    code = """
import os, threading, warnings
warnings.simplefilter("ignore")
from engine.cpu.threads import ThreadPool
pool = ThreadPool(2)
barrier = threading.Barrier(2, timeout=10)
pool.run(lambda _: barrier.wait(), 2)
child = os.fork()
barrier = threading.Barrier(2, timeout=10)
pool.run(lambda _: barrier.wait(), 2)
pool.close()
if child == 0:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@pytest.mark.parametrize("bad", [0, -1, 1025])
def test_bad_thread_count(bad):
    with pytest.raises(InvalidRequestError, match=f"between 1 and 1024, not {bad}"):
        ThreadPool(bad)


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _machine(root, siblings):
    for cpu, group in enumerate(siblings):
        _write(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", group + "\n")


@pytest.mark.parametrize(
    ("siblings", "allowed", "expected"),
    [
        (["0-1", "0-1", "2-3", "2-3"], {0, 1, 2, 3}, 2),
        (["0-1", "0-1", "2-3", "2-3"], {1, 2}, 2),
        (["0,4", "1,5", "2", "3", "0,4", "1,5"], {0, 1, 2, 3, 4, 5}, 4),
        (["0"], {0}, 1),
        ([], {0, 1, 2}, 3),
    ],
)
def test_physical_cores(tmp_path, monkeypatch, siblings, allowed, expected):
    _machine(tmp_path, siblings)
    monkeypatch.setattr(threads_module.os, "sched_getaffinity", lambda _: allowed, raising=False)
    assert default_threads(tmp_path) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "0::/user/job",
                "sys/fs/cgroup/user/cpu.max": "200000 100000",
                "sys/fs/cgroup/user/job/cpu.max": "max 100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/box\n2:memory:/box",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            8,
        ),
        ({"sys/fs/cgroup/cpu.max": "nonsense"}, 8),
    ],
)
def test_cpu_quota(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(threads_module.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for path, text in files.items():
        _write(tmp_path / path, text + "\n")
    assert default_threads(tmp_path) == expected
