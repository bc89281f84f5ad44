"""The jinja2 environment chat templates run in: what Hugging Face templates expect, and nothing they could harm with.

A template comes with a downloaded file. It reaches no Python objects (jinja2's immutable sandbox), takes a bounded
number of steps, and makes no value beyond a bounded size. It may change the lists and mappings that it has made
itself, but none that it was given. This module knows nothing of messages or tokenizers.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000  # rounds of loops and calls, all together
MAX_SECONDS = 10.0
MAX_SIZE = 4_000_000  # characters and items in one value, everything inside it included, and in the output
_MAX_BITS = 4096  # of an integer
_MAX_WIDTH = 1000  # of padding and indentation
_LONG_NUMBER = re.compile(r"\d{5,}")  # a width in a format string that pads to more than any template needs

# Methods that change a value in place and cannot grow it by more than their arguments.
_CHANGES: dict[type, frozenset[str]] = {
    list: frozenset({"append", "extend", "insert", "pop", "remove", "reverse", "sort", "clear"}),
    dict: frozenset({"update", "setdefault", "pop", "popitem", "clear"}),
}


@dataclass
class _Budget:
    """What one render may still use.

    Attributes:
        steps: rounds and calls left.
        deadline: when time is up, on the monotonic clock.
        growth: characters and items that methods may still put into lists and mappings.
        given: the containers that the template was given, by identity; they are never changed.
    """

    steps: int
    deadline: float
    growth: int
    given: dict[int, Any] = field(default_factory=dict)


_budget: ContextVar[_Budget] = ContextVar("chat_template_budget")


class TemplateRefusal(TemplateError):
    """The template called `raise_exception`: it does not take these messages."""


class TemplateLimitError(SecurityError):
    """The template needs more steps or space than any real one does."""


def start_budget(given: Any = ()) -> None:
    """Gives the render that starts now its full budget of steps and time.

    Args:
        given: the values that the template gets; it cannot change the containers in them.
    """
    _budget.set(_Budget(MAX_STEPS, time.monotonic() + MAX_SECONDS, MAX_SIZE, _containers(given)))


def spend_step() -> None:
    """Takes a step from the budget of the render that is running; raises TemplateLimitError when it is used up."""
    budget = _budget.get()
    if budget.steps <= 0:
        raise TemplateLimitError(f"it runs for more than {MAX_STEPS} steps")
    if time.monotonic() > budget.deadline:
        raise TemplateLimitError(f"it runs for more than {MAX_SECONDS:g} seconds")
    budget.steps -= 1


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
    """Gives the value back if it is of bearable size, else raises TemplateLimitError.

    Lists inside lists count as often as they appear, because writing them out would repeat them.
    """
    if isinstance(value, int):
        if value.bit_length() > _MAX_BITS:
            raise TemplateLimitError(f"it makes a number of {value.bit_length()} bits, more than {_MAX_BITS}")
    elif isinstance(value, (str, bytes, list, tuple, dict)):
        _size(value)
    return value


def _size(value: Any) -> int:
    """Characters and items of a value, everything inside it included; raises TemplateLimitError beyond MAX_SIZE."""
    size = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (str, bytes, list, tuple, dict)):
            size += len(item)
            _forbid_growth(size)
            if isinstance(item, dict):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple)):
                waiting += item
    return size


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        spend_step()
        yield item


def _forbid_growth(size: int) -> None:
    if size > MAX_SIZE:
        raise TemplateLimitError(f"it makes a value of {size} or more characters and items; the limit is {MAX_SIZE}")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it only shows them."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Sandboxed environment whose loops, calls and values are bounded."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: Callable[[], datetime] = datetime.now) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=check_size
        )
        self.filters["tojson"] = _to_json
        self.filters["_counted"] = _counted
        self.filters["_sized"] = check_size
        self.filters["replace"] = _replace
        self.filters["join"] = _join(self.filters["join"])
        self.filters["format"] = _checked_format
        self.filters["sum"] = _sum
        for name in ("center", "indent", "truncate", "batch", "slice"):
            self.filters[name] = _narrow_arguments(self.filters[name])
        for name in ("wordwrap", "urlize", "xmlattr"):  # layout of web pages, with growth of their own
            del self.filters[name]
        # A list can be changed after it was put into another one: sizes are looked at again where values are used.
        for table in (self.filters, self.tests):
            functions: dict[str, Any] = dict(table)
            table.update({name: _checked_arguments(function) for name, function in functions.items()})
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda pattern: now().strftime(str(pattern)[:1000])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parses, then makes every loop count its rounds and every text that is put together check its size."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "_counted")
        for block in list(tree.find_all(nodes.AssignBlock)):
            block.filter = _filtered(block.filter, "_sized")
        for concat in list(tree.find_all(nodes.Concat)):
            sized: list[nodes.Expr] = [_filtered(node, "_sized") for node in concat.nodes]
            concat.nodes = [_filtered(nodes.Concat(sized, lineno=concat.lineno), "_sized")]
        for comparison in list(tree.find_all(nodes.Compare)):
            comparison.expr = _filtered(comparison.expr, "_sized")
            for operand in comparison.ops:
                operand.expr = _filtered(operand.expr, "_sized")
        for assign in list(tree.find_all(nodes.Assign)):
            assign.node = _filtered(assign.node, "_sized")
        return tree

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call from the template: one step; methods that can blow a value up are checked beforehand."""
        spend_step()
        if isinstance(obj, LoopContext) and args:  # the next level of a recursive loop
            args = (_counted(args[0]), *args[1:])
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        for value in (owner, *args, *kwargs.values()):
            check_size(value)
        if isinstance(owner, str):
            _check_string_method(owner, name, args, kwargs)
        elif name in _CHANGES.get(type(owner), ()):
            args = _checked_change(owner, name, args, kwargs)
        return check_size(super().call(context, obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Lets a template change what it has made itself, by the methods that are known to be harmless."""
        if attr in _CHANGES.get(type(obj), ()):
            return id(obj) not in _budget.get().given
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandboxed str.format, with a look at the widths it would pad to."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_widths(value.__self__, (*args, *kwargs.values()), nested=r"\{[^{}]*\{")
            return wrapped(*args, **kwargs)

        return bounded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operation, refused if its result would be huge."""
        for one, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, int) and isinstance(other, (str, bytes, list, tuple)):
                _forbid_growth(one * len(other))
        if (
            operator == "**"
            and isinstance(left, int)
            and isinstance(right, int)
            and left.bit_length() * abs(right) > _MAX_BITS
        ):
            raise TemplateLimitError(f"it makes a number of more than {_MAX_BITS} bits")
        if operator == "%" and isinstance(left, str):
            check_size(right)
            _check_widths(left, right if isinstance(right, tuple) else (right,), nested=r"\*")
        return check_size(super().call_binop(context, operator, left, right))


def _filtered(node: Any, name: str) -> nodes.Filter:
    lineno = 1 if node is None else node.lineno
    return nodes.Filter(node, name, [], [], None, None, lineno=lineno)


def _check_string_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if name in ("ljust", "rjust", "center", "zfill", "expandtabs"):
        for width in (*args, *kwargs.values()):
            if isinstance(width, int):
                _forbid_growth(width * (len(text) + 1 if name == "expandtabs" else 1))
    elif name == "replace" and len(args) >= 2 and all(isinstance(arg, str) for arg in args[:2]):
        _forbid_growth(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args:
        items = args[0]
        if isinstance(items, (list, tuple, str, dict)):
            _forbid_growth(len(text) * len(items) + sum(len(item) for item in items if isinstance(item, str)))
    elif name == "translate":
        raise TemplateLimitError("it calls str.translate, which is not available")


def _checked_change(owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a method that changes a list or mapping; all additions of a render together are bounded."""
    if name == "sort" and (args or kwargs.keys() - {"reverse"}):
        raise TemplateLimitError("it calls list.sort with something other than reverse")
    if name == "extend":
        args = tuple(list(_counted(arg)) for arg in args)
    if name in ("append", "extend", "insert", "update", "setdefault"):
        budget = _budget.get()
        budget.growth -= _size([*args, *kwargs.values()])
        if budget.growth < 0:
            raise TemplateLimitError(f"it puts more than {MAX_SIZE} characters and items into lists")
    return args


def _checked_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that refuses values of unbearable size."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, tuple, dict)):
                check_size(value)
        return function(*args, **kwargs)

    return checked


def _check_widths(text: str, values: Iterable[Any], *, nested: str) -> None:
    """Refuses format strings that pad widely, be the width written out or (`nested`) taken from a value."""
    from_value = re.search(nested, text) is not None
    if _LONG_NUMBER.search(text) or (from_value and any(isinstance(v, int) and abs(v) > 9999 for v in values)):
        raise TemplateLimitError("it pads a text beyond any use")


def _checked_format(text: Any, *args: Any, **kwargs: Any) -> str:
    _check_widths(str(text), (*args, *kwargs.values()), nested=r"\*")
    return str(text) % (kwargs or args)


def _sum(items: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, (int, float)):
        raise TemplateLimitError("it sums up something other than numbers")
    if attribute is not None:
        items = (item[attribute] for item in items)
    return sum(items, start)


def _narrow_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, refusing widths and counts that no chat template needs."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                _narrow(value)
        if args and isinstance(args[0], str):
            widths = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, (int, str))]
            width = max((len(value) if isinstance(value, str) else value for value in widths), default=4)
            _forbid_growth(len(args[0]) + args[0].count("\n") * width)
        return function(*args, **kwargs)

    return bounded


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    whole, wanted, put = str(text), str(old), str(new)
    _forbid_growth(len(whole) + whole.count(wanted) * len(put))
    return whole.replace(wanted, put, -1 if count is None else count)


def _join(join: Callable[..., Any]) -> Callable[..., Any]:
    def bounded(context: Any, items: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
        held = list(_counted(items))
        longest = max((len(item) for item in held if isinstance(item, str)), default=0)
        _forbid_growth(len(held) * (len(str(d)) + longest))
        return join(context, held, d, attribute)

    bounded.jinja_pass_arg = join.jinja_pass_arg  # type: ignore[attr-defined]
    return bounded


def _narrow(width: Any) -> Any:
    size = len(width) if isinstance(width, str) else width
    if isinstance(size, int) and size > _MAX_WIDTH:
        raise TemplateLimitError(f"it pads or indents by {size} characters, more than {_MAX_WIDTH}")
    return width


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(str(message))


def _to_json(
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
        return list(_counted(value))
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
