"""Filters and methods of the template sandbox that can make a value huge, each with its check.

They take what jinja2's own take, and give what Hugging Face's templates expect.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from engine.text.templates.limits import (
    MAX_SIZE,
    TemplateLimitError,
    check_size,
    counted,
    forbid_growth,
    running,
    size_of,
    spend_steps,
)

_MAX_WIDTH = 1000  # of padding and indentation
_ITEMS_A_STEP = 100  # of a list that a method moves or compares
_LONG_NUMBER = re.compile(r"\d{5,}")  # a width in a format string that pads to more than any template needs

# Methods that change a value in place and cannot grow it by more than their arguments.
CHANGES: dict[type, frozenset[str]] = {
    list: frozenset({"append", "extend", "insert", "pop", "remove", "reverse", "sort", "clear"}),
    dict: frozenset({"update", "setdefault", "pop", "popitem", "clear"}),
}


def check_string_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a method of strings whose result would be huge."""
    if name in ("ljust", "rjust", "center", "zfill", "expandtabs"):
        for width in (*args, *kwargs.values()):
            if isinstance(width, int):
                forbid_growth(width * (len(text) + 1 if name == "expandtabs" else 1))
    elif name == "replace" and len(args) >= 2 and all(isinstance(arg, str) for arg in args[:2]):
        forbid_growth(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args:
        items = args[0]
        if isinstance(items, (list, tuple, str, dict)):
            forbid_growth(len(text) * len(items) + sum(len(item) for item in items if isinstance(item, str)))
    elif name == "translate":
        raise TemplateLimitError("it calls str.translate, which is not available")


def checked_change(owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a method that changes a list or mapping; all additions of a render together are bounded."""
    if name == "sort" and (args or kwargs.keys() - {"reverse"}):
        raise TemplateLimitError("it calls list.sort with something other than reverse")
    if name in ("insert", "pop", "remove", "reverse", "sort"):  # these go through the list
        spend_steps(len(owner) // _ITEMS_A_STEP)
    if name == "remove":
        check_size(owner)
    if name == "extend":
        args = tuple(list(counted(arg)) for arg in args)
    if name in ("append", "extend", "insert", "update", "setdefault"):
        budget = running.get()
        budget.growth -= size_of([*args, *kwargs.values()])
        if budget.growth < 0:
            raise TemplateLimitError(f"it puts more than {MAX_SIZE} characters and items into lists")
    return args


def checked_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that refuses values beyond MAX_SIZE."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, tuple, dict)):
                check_size(value)
        return function(*args, **kwargs)

    return checked


def check_widths(text: str, values: Iterable[Any], *, nested: str) -> None:
    """Refuses format strings that pad widely, be the width written out or (`nested`) taken from a value."""
    from_value = re.search(nested, text) is not None
    if _LONG_NUMBER.search(text) or (from_value and any(isinstance(v, int) and abs(v) > 9999 for v in values)):
        raise TemplateLimitError("it pads a text to more characters than any prompt needs")


def format_filter(text: Any, *args: Any, **kwargs: Any) -> str:
    """The filter format: text % values."""
    check_widths(str(text), (*args, *kwargs.values()), nested=r"\*")
    return str(text) % (kwargs or args)


def sum_filter(items: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """The filter sum, of numbers only."""
    if not isinstance(start, (int, float)):
        raise TemplateLimitError("it sums up something other than numbers")
    if attribute is not None:
        items = (item[attribute] for item in items)
    return sum(items, start)


def narrow_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, refusing widths and counts that no chat template needs."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                _narrow(value)
        if args and isinstance(args[0], str):
            widths = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, (int, str))]
            width = max((len(value) if isinstance(value, str) else value for value in widths), default=4)
            forbid_growth(len(args[0]) + args[0].count("\n") * width)
        return function(*args, **kwargs)

    return bounded


def replace_filter(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """The filter replace."""
    whole, wanted, put = str(text), str(old), str(new)
    forbid_growth(len(whole) + whole.count(wanted) * len(put))
    return whole.replace(wanted, put, -1 if count is None else count)


def join_filter(join: Callable[..., Any]) -> Callable[..., Any]:
    """The filter join, refusing what would be huge."""

    def bounded(context: Any, items: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
        held = list(counted(items))
        longest = max((len(item) for item in held if isinstance(item, str)), default=0)
        forbid_growth(len(held) * (len(str(d)) + longest))
        return join(context, held, d, attribute)

    bounded.jinja_pass_arg = join.jinja_pass_arg  # type: ignore[attr-defined]
    return bounded


def _narrow(width: Any) -> Any:
    size = len(width) if isinstance(width, str) else width
    if isinstance(size, int) and size > _MAX_WIDTH:
        raise TemplateLimitError(f"it pads or indents by {size} characters, more than {_MAX_WIDTH}")
    return width


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face templates expect it: no HTML escapes, other scripts as they are."""
    written = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=_narrow(indent),
        separators=separators,
        sort_keys=sort_keys,
        default=_listed,
    )
    check_size(written)
    return written


def _listed(value: Any) -> list[Any]:
    """What the filters map and select give, which is no list yet."""
    if isinstance(value, Iterator):
        return list(counted(value))
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
