"""What must be made new in the child of a fork: only the forking thread exists there, and locks may be in any state."""

from __future__ import annotations

import os
import threading
import weakref
from _thread import LockType
from typing import Any, Protocol


class Forked(Protocol):
    """An object with something to make new."""

    def after_fork(self) -> None:
        """Called once in every child of a fork, before anything else runs there."""


_objects: weakref.WeakSet[Forked] = weakref.WeakSet()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def register(one: Forked) -> None:
    """Have an object's after_fork() called in children, as long as the object exists."""
    _objects.add(one)


def new_lock() -> LockType:
    """A lock that is free in every child, where a plain one stays locked if another thread held it at the fork."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def renew(lock: Any) -> None:
    """Have a lock of another package be free in every child; a lock of an unknown kind is left alone."""
    if hasattr(lock, "_at_fork_reinit"):
        _locks.add(lock)


def _in_child() -> None:
    for lock in list(_locks):
        lock._at_fork_reinit()
    for one in list(_objects):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
