"""Asynchronous exceptions at chosen places: what a signal handler, a test timeout or another thread may raise."""

import gc
import inspect
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import engine

ENGINE = str(Path(engine.__file__).parent)


@contextmanager
def without_collector_callbacks():
    """What a signal raises in a function that the garbage collector calls, as hypothesis has one, reaches nobody."""
    kept = gc.callbacks[:]
    gc.callbacks.clear()
    try:
        yield
    finally:
        gc.callbacks[:] = kept


class Interruption:
    """Sends SIGINT at the call number `at` inside the engine; for sys.setprofile.

    Generators are left out: Python swallows what is raised while it closes one.
    """

    def __init__(self, at):
        self.at, self.seen = at, 0

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ENGINE) and not code.co_flags & inspect.CO_GENERATOR:
            self.seen += 1
            if self.seen == self.at:
                signal.raise_signal(signal.SIGINT)


def interrupted(actions, at, more):
    """Results of the actions, each called again after every interrupt, and how many interrupts there were.

    Every call is interrupted at call number `at` inside the engine, and `more` later after each interrupt.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    results, count = [], 0
    try:
        for action in actions:
            over = False
            while not over:
                sys.setprofile(Interruption(at + more * count))
                try:
                    results.append(action())
                    over = True
                except KeyboardInterrupt:
                    count += 1
                finally:
                    sys.setprofile(None)
    finally:
        signal.signal(signal.SIGINT, before)
    return results, count


class Injected(Exception):
    """Raised by the test at a line of the engine, as a signal handler could."""


def engine_files(*names):
    """Full names of files of the package."""
    files = {str(Path(engine.__file__).parent / name) for name in names}
    assert all(Path(file).is_file() for file in files), files
    return files


class Injection:
    """Raises an exception at the `at`-th line (or call, or return) that a thread executes in the given files.

    Args:
        at: number of the event, from 1; 0 raises nothing and only counts.
        files: full names of source files.
        kind: the exception class.
        events: which of "call", "line", "return" count. A return from a frame that other code called never does: what
            arrives after it arrives in that code.
        opcodes: count single instructions as well.
    """

    def __init__(self, at, files, kind=Injected, *, events=("call", "line", "return"), opcodes=False):
        self.at, self.files, self.kind, self.seen = at, files, kind, 0
        self.events = {*events, "opcode"} if opcodes else set(events)
        self.opcodes = opcodes
        self.where = None

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes = self.opcodes
        leaves = event == "return" and (frame.f_back is None or frame.f_back.f_code.co_filename not in self.files)
        if event in self.events and not leaves:
            self.seen += 1
            if self.seen == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {event}"
                raise self.kind(self.where)
        return self

    def during(self, action):
        """Whether the action came to its end, and what it returned."""
        before = sys.gettrace()
        try:
            sys.settrace(self)
            value = action()
            sys.settrace(before)
            return True, value
        except BaseException as error:
            sys.settrace(before)
            if self.where is None or not isinstance(error, self.kind):
                raise
            return False, None


def within(seconds, action):
    """What an action gives on a thread of its own; fails if it takes longer."""
    box = []
    thread = threading.Thread(target=lambda: box.append(action()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert box, "the other thread waits for ever, or failed"
    return box[0]
