"""A property that is computed once per object, without a lock.

Before Python 3.12 functools.cached_property has one lock for all objects of a class, which stays locked in the child of
a fork if another thread computed one. Two threads may compute the value at once here; the first one kept counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class lazy(Generic[T]):
    """A method without arguments as an attribute that is computed when it is first read."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, owner: None, kind: type[Any]) -> lazy[T]: ...
    @overload
    def __get__(self, owner: object, kind: type[Any]) -> T: ...
    def __get__(self, owner: object | None, kind: type[Any]) -> T | lazy[T]:
        if owner is None:
            return self
        # Into the object's own attributes, which Python finds before this descriptor from then on.
        value: T = owner.__dict__.setdefault(self._name, self._compute(owner))
        return value
