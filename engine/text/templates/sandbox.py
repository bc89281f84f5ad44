"""The jinja2 environment chat templates run in: what Hugging Face templates expect, and nothing that could do harm.

A template comes with a downloaded file. It reaches no Python objects (jinja2's immutable sandbox), takes a bounded
number of steps, and makes no value beyond a bounded size. It may change the lists and mappings that it has made
itself, but none that it was given. Independent of messages and tokenizers.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.text.templates.filters import (
    CHANGES,
    check_string_method,
    check_widths,
    checked_arguments,
    checked_change,
    format_filter,
    join_filter,
    narrow_arguments,
    replace_filter,
    sum_filter,
    to_json,
)
from engine.text.templates.limits import (
    MAX_BITS,
    MAX_SIZE,
    TemplateLimitError,
    begin_budget,
    check_size,
    counted,
    forbid_growth,
    running,
    spend_step,
)

__all__ = ["MAX_SECONDS", "MAX_SIZE", "ChatEnvironment", "TemplateLimitError", "TemplateRefusal", "start_budget"]

MAX_SECONDS = 10.0


class TemplateRefusal(TemplateError):
    """The template called `raise_exception`: it does not take these messages."""


def start_budget(given: Any = ()) -> None:
    """Gives the render that starts now its full budget of steps and time.

    Args:
        given: the values that the template gets; it cannot change the containers in them.
    """
    begin_budget(MAX_SECONDS, given)


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
        self.filters["tojson"] = to_json
        self.filters["replace"] = replace_filter
        self.filters["join"] = join_filter(self.filters["join"])
        self.filters["format"] = format_filter
        self.filters["sum"] = sum_filter
        for name in ("center", "indent", "truncate", "batch", "slice"):
            self.filters[name] = narrow_arguments(self.filters[name])
        for name in ("wordwrap", "urlize", "xmlattr"):  # layout of web pages, with growth of their own
            del self.filters[name]
        # A list can be changed after it was put into another one: sizes are looked at again where values are used.
        for table in (self.filters, self.tests):
            functions: dict[str, Any] = dict(table)
            table.update({name: checked_arguments(function) for name, function in functions.items()})
        self.filters["_counted"] = counted
        self.filters["_sized"] = check_size
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
            args = (counted(args[0]), *args[1:])
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        for value in (*args, *kwargs.values()):
            check_size(value)
        if isinstance(owner, str):
            check_string_method(owner, name, args, kwargs)
        elif name in CHANGES.get(type(owner), ()):
            args = checked_change(owner, name, args, kwargs)
        else:
            check_size(owner)
        return check_size(super().call(context, obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Lets a template change what it has made itself, by the methods that are known to be harmless."""
        if attr in CHANGES.get(type(obj), ()):
            return id(obj) not in running.get().given
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandboxed str.format, with a look at the widths it would pad to."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            check_widths(value.__self__, (*args, *kwargs.values()), nested=r"\{[^{}]*\{")
            return wrapped(*args, **kwargs)

        return bounded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operation, refused if its result would be beyond the limits."""
        for one, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, int) and isinstance(other, (str, bytes, list, tuple)):
                forbid_growth(one * len(other))
        if (
            operator == "**"
            and isinstance(left, int)
            and isinstance(right, int)
            and left.bit_length() * abs(right) > MAX_BITS
        ):
            raise TemplateLimitError(f"it makes a number of more than {MAX_BITS} bits")
        if operator == "%" and isinstance(left, str):
            check_size(right)
            check_widths(left, right if isinstance(right, tuple) else (right,), nested=r"\*")
        return check_size(super().call_binop(context, operator, left, right))


def _filtered(node: Any, name: str) -> nodes.Filter:
    lineno = 1 if node is None else node.lineno
    return nodes.Filter(node, name, [], [], None, None, lineno=lineno)


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(str(message))
