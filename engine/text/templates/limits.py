"""What one render of a template may use: steps, seconds, and sizes of values."""

import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from jinja2.exceptions import SecurityError

MAX_STEPS = 1_000_000  # rounds of loops and calls, all together
MAX_SIZE = 4_000_000  # characters and items in one value, everything inside it included, and in the output
MAX_BITS = 4096  # of an integer


class TemplateLimitError(SecurityError):
    """The template needs more steps or space than any real one does."""


@dataclass
class Budget:
    """What one render may still use.

    Attributes:
        steps: rounds and calls left.
        deadline: when the time is used up, on the monotonic clock.
        seconds: from the beginning to then.
        growth: characters and items that methods may still put into lists and mappings.
        given: the containers that the template was given, by identity; they are never changed.
    """

    steps: int
    deadline: float
    seconds: float
    growth: int
    given: dict[int, Any] = field(default_factory=dict)


running: ContextVar[Budget] = ContextVar("chat_template_budget")


def begin_budget(seconds: float, given: Any) -> None:
    """Gives the render that starts now its full budget.

    Args:
        seconds: how long it may run.
        given: the values that the template gets; it cannot change the containers in them.
    """
    running.set(Budget(MAX_STEPS, time.monotonic() + seconds, seconds, MAX_SIZE, _containers(given)))


def spend_step() -> None:
    """Takes a step from the budget of the render that is running; raises TemplateLimitError when it is used up."""
    spend_steps(1)


def spend_steps(count: int) -> None:
    """Takes several steps at once."""
    budget = running.get()
    if budget.steps <= 0:
        raise TemplateLimitError(f"it runs for more than {MAX_STEPS} steps")
    if time.monotonic() > budget.deadline:
        raise TemplateLimitError(f"it runs for more than {budget.seconds:g} seconds")
    budget.steps -= count


def _containers(given: Any) -> dict[int, Any]:
    """All lists and mappings in a value, by identity."""
    found: dict[int, Any] = {}
    waiting = [given]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (list, tuple, dict)) and id(item) not in found:
            found[id(item)] = item
            waiting += item.values() if isinstance(item, dict) else item
    return found


def check_size(value: Any) -> Any:
    """Returns the value if its size is within the limits, else raises TemplateLimitError.

    Lists inside lists count as often as they appear, because writing them out would repeat them.
    """
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise TemplateLimitError(f"it makes a number of {value.bit_length()} bits, more than {MAX_BITS}")
    elif isinstance(value, (str, bytes, list, tuple, dict)):
        size_of(value)
    return value


def size_of(value: Any) -> int:
    """Characters and items of a value, everything inside it included.

    Each list is looked at once, however often it appears, so that the time is bounded by the number of distinct items.

    Raises:
        TemplateLimitError: the size is beyond MAX_SIZE, or the value contains itself.
    """
    if isinstance(value, (str, bytes)):
        forbid_growth(len(value))
        return len(value)
    sizes: dict[int, int] = {}
    path: set[int] = set()  # of the lists around the one that is being measured
    waiting = [value]
    while waiting:
        item = waiting[-1]
        if id(item) in sizes:
            waiting.pop()
            continue
        inside = [*item.keys(), *item.values()] if isinstance(item, dict) else item
        lists = [one for one in inside if isinstance(one, (list, tuple, dict))]
        unknown = {id(one): one for one in lists if id(one) not in sizes}
        if not unknown:
            waiting.pop()
            path.discard(id(item))
            texts = sum(len(one) for one in inside if isinstance(one, (str, bytes)))
            size = len(item) + texts + sum(sizes[id(one)] for one in lists)
            forbid_growth(size)
            sizes[id(item)] = size
            continue
        path.add(id(item))
        if not path.isdisjoint(unknown):
            raise TemplateLimitError("it puts a list into itself")
        waiting += unknown.values()
    return sizes[id(value)]


def counted(items: Iterable[Any]) -> Iterator[Any]:
    """The items, each for one step."""
    for item in items:
        spend_step()
        yield item


def forbid_growth(size: int) -> None:
    """Raises TemplateLimitError for a value of too large a size."""
    if size > MAX_SIZE:
        raise TemplateLimitError(f"it makes a value of {size} or more characters and items; the limit is {MAX_SIZE}")
