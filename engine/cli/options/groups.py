"""Groups of options: dataclasses whose fields are options, which commands take as one argument each.

Knows no option and no command.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from engine.cli.terminal import utf8_text

Result = TypeVar("Result")


class Only:
    """Annotated[Group, Only("seed")]: a command takes these fields of the group alone."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def takes(self, name: str) -> bool:
        """Whether the field of that name becomes an option."""
        return name in self.names


class Without(Only):
    """Annotated[Group, Without("seed")]: a command takes all fields but these, which keep their default."""

    def takes(self, name: str) -> bool:  # noqa: D102 - see Only
        return name not in self.names


def with_groups(command: Callable[..., Result]) -> Callable[..., Result]:
    """A command for typer, of one with arguments that are groups.

    A group is a dataclass whose fields all have a default and the type Annotated[..., typer.Option(...)]. In place of
    an argument of that type the returned command has an option for each field, in the order of the fields.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[type, list[str]]] = {}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        group, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if is_dataclass(group):
            assert isinstance(group, type)
            expanded = _expand(group, marks)
            groups[parameter.name] = group, [field.name for field in expanded]
            parameters += expanded
        else:
            # By keyword alone: typer passes every argument by name, and so their order is free.
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**given: Any) -> Result:
        given = {name: _readable(name, value) for name, value in given.items()}
        for argument, (group, names) in groups.items():
            given[argument] = group(**{name: given.pop(name) for name in names})
        return command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _readable(name: str, value: Any) -> Any:
    """The value of an argument, where it is text as UTF-8 whatever the locale says.

    Python puts surrogates in place of bytes that the locale does not decode; a tokenizer would take them for U+FFFD.

    Raises:
        InvalidRequestError: it is not UTF-8 and names no file.
    """
    if isinstance(value, list):
        return [_readable(name, one) for one in value]
    if not isinstance(value, str):
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return value if os.path.lexists(value) else utf8_text(os.fsencode(value), name)
    return value


def _expand(group: type, marks: list[Any]) -> list[inspect.Parameter]:
    """A parameter for each field of a group that the marks let pass."""
    hints = get_type_hints(group, include_extras=True)
    for mark in marks:
        unknown = [name for name in mark.names if name not in hints]
        assert not unknown, f"{group.__name__} has no field {unknown[0]}"
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
        if all(mark.takes(field.name) for mark in marks)
    ]
