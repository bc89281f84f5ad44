"""Asynchronous exceptions at chosen places: what a signal handler, a test timeout or another thread may raise."""

import sys
import threading
from pathlib import Path

import engine


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
