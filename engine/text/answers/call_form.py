"""How one family of models writes calls, to the character: the description that records are made of."""

import re
from dataclasses import KW_ONLY, dataclass

PLACES = re.compile(r"\$(name|arguments|id|index|key|value|type)\b")
"""Filled in: the name of the function, its arguments, the id of the call, its number; a parameter's name, value and
JSON type."""


@dataclass(frozen=True)
class Tree:
    """How values inside of values are written, in families that do not write JSON there.

    Attributes:
        string: what is before and behind a string.
        member: one member of an object, with $key and $value.
        item: one item of an array, with $value.
        separator: what is between two of them.
        braces: what is before and behind the members of an object.
        brackets: what is before and behind the items of an array.
    """

    string: tuple[str, str]
    member: str
    item: str
    separator: str = ""
    braces: tuple[str, str] = ("", "")
    brackets: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class CallForm:
    """The text of calls in one family.

    A section of calls is begin, first, one or several calls, last, end.

    Attributes:
        name: of the record, as `--tool-format` takes it.
        begin: the marker that opens calls; "" where the call itself is the first text.
        call: one call, with $name, $arguments, $id and $index in it.
        end: the marker that closes calls; "" where the end of the answer does.
        between: what is between two calls of one section; None: each call has a section of its own.
        around: what is before the first and behind the last call of a section.
        several: whether there can be more than one call.
        parameter: one parameter with $key and $value, where the arguments are not one JSON object.
        quoted: whether values that are strings are written as in JSON in `parameter`, or as they are.
        separator: what is between two parameters.
        other_parameter: the same for values that are no strings, where that differs.
        opens: the marker that opens a header, in families whose answers are several messages.
        thought: a message that may come before the calls there: its begin and its end.
        body: in such families, the marker that ends the header of a call.
        lead: an empty text that the family writes before its calls.
        id: the id of a call, where it is made of its $name and $index.
        tree: how values are written where that is not JSON.
    """

    name: str
    begin: str
    call: str
    end: str = ""
    _: KW_ONLY
    between: str | None = None
    around: tuple[str, str] = ("", "")
    several: bool = True
    parameter: str = ""
    quoted: bool = False
    separator: str = ""
    other_parameter: str = ""
    opens: str = ""
    thought: tuple[str, str] = ("", "")
    body: str = ""
    lead: str = ""
    id: str = ""
    tree: Tree | None = None

    @property
    def loose(self) -> bool:
        """Whether white space outside of values may be other than written here, as it is in JSON."""
        return not self.parameter and '"$name"' in self.call


def filled(pattern: str, **values: str) -> str:
    """A pattern with its places filled in."""
    return PLACES.sub(lambda place: values[place[1]], pattern)
