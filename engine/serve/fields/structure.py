"""Fields that say what an answer has to be, in the words of each API → a constraint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from engine.errors import InvalidRequestError
from engine.sampling.constraint import Choice, Constraint, Gbnf, JsonObject, JsonSchema, Lark, Regex
from engine.serve.errors import ApiError

_RESPONSE_TYPES = "text, json_object, json_schema"
_VLLM_OPTIONS = {"disable_fallback": (None, False, True), "disable_any_whitespace": (None, False)}
"""Of structured_outputs: options with the values that change nothing here."""


class Structure(NamedTuple):
    """What an answer has to be, and the field of the request that says so.

    Attributes:
        constraint: None: any text.
        field: as the client wrote it; None where there is no constraint.
    """

    constraint: Constraint | None = None
    field: str | None = None


def structure_of(fields: Mapping[str, Any]) -> Structure:
    """The constraint that a request asks for.

    Args:
        fields: those of FIELDS that it has, by name; None counts as left out.

    Raises:
        ApiError: 400; several at once, an unknown kind, or one that no answer can have.
    """
    found: list[Structure] = []
    for name, value in fields.items():
        if value is None or (value == "" and name in ("grammar", "format")):
            continue
        try:
            constraint = FIELDS[name](name, value)
        except InvalidRequestError as error:
            raise _refused(name, str(error)) from None
        if constraint is not None:
            found.append(Structure(constraint, name))
    if len(found) > 1:
        raise _refused(str(found[1].field), f"{found[0].field} and {found[1].field} are both given; give one")
    return found[0] if found else Structure()


def _refused(field: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message if message.startswith(field) else f"{field}: {message}", param=field, code=code)


def _found(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _object(field: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _refused(field, f"{field} is {_found(value)}; allowed: a JSON object", "invalid_type")
    return value


def _response_format(field: str, value: Any) -> Constraint | None:
    """OpenAI's, with the schema either inside "json_schema" or, as llama.cpp and the Responses API have it, beside."""
    given = _object(field, value)
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = given.get("schema")
        return JsonObject() if schema is None else _schema(f"{field}.schema", schema)
    if kind != "json_schema":
        raise _refused(f"{field}.type", f"{field}.type is {_found(kind)}; allowed: {_RESPONSE_TYPES}")
    inside = given.get("json_schema")
    where, holder = (field, given) if inside is None else (f"{field}.json_schema", _object(field, inside))
    strict = holder.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise _refused(f"{where}.strict", f"{where}.strict is {_found(strict)}; allowed: true or false", "invalid_type")
    schema = holder.get("schema")
    if schema is None:
        raise _refused(f"{where}.schema", f"the field {where}.schema is missing", "missing_required_parameter")
    return _schema(f"{where}.schema", schema)


def _schema(field: str, value: Any) -> Constraint:
    if not isinstance(value, (Mapping, bool)):
        raise _refused(field, f"{field} is {_found(value)}; allowed: a JSON schema as an object", "invalid_type")
    return JsonSchema(value)


def _json(field: str, value: Any) -> Constraint:
    """A schema as an object or as JSON text."""
    return JsonSchema(value) if isinstance(value, str) else _schema(field, value)


def _flag(field: str, value: Any) -> Constraint | None:
    if not isinstance(value, bool):
        raise _refused(field, f"{field} is {_found(value)}; allowed: true or false", "invalid_type")
    return JsonObject() if value else None


def _grammar(field: str, value: Any) -> Constraint:
    """vLLM's: either of the two kinds, told apart by how rules are written."""
    return Gbnf(value) if isinstance(value, str) and "::=" in value else Lark(value)


_KINDS: dict[str, Callable[[str, Any], Constraint | None]] = {
    "json": _json,
    "regex": lambda _, value: Regex(value),
    "choice": lambda _, value: Choice(value),
    "grammar": _grammar,
    "json_object": _flag,
}


def _structured_outputs(field: str, value: Any) -> Constraint | None:
    given = {name: one for name, one in _object(field, value).items() if one is not None}
    found: list[Constraint] = []
    for name, one in given.items():
        place = f"{field}.{name}"
        if name in _KINDS:
            constraint = _KINDS[name](place, one)
            found += [] if constraint is None else [constraint]
        elif name not in _VLLM_OPTIONS or one not in _VLLM_OPTIONS[name]:
            allowed = ", ".join(_KINDS)
            raise _refused(place, f"{place} is not supported by this server; allowed: {allowed}", _UNSUPPORTED)
    if len(found) > 1:
        raise _refused(field, f"{field} has {len(found)} kinds at once; give one")
    return found[0] if found else None


_UNSUPPORTED = "unsupported_parameter"


def _ollama(field: str, value: Any) -> Constraint:
    if value == "json":
        return JsonObject()
    if not isinstance(value, Mapping):
        raise _refused(field, f'{field} is {_found(value)}; allowed: "json" or a JSON schema', "invalid_type")
    return JsonSchema(value)


FIELDS: dict[str, Callable[[str, Any], Constraint | None]] = {
    "response_format": _response_format,
    "text.format": _response_format,
    "output_format": _response_format,
    "output_config.format": _response_format,
    "grammar": lambda _, value: Gbnf(value),
    "json_schema": _json,
    "structured_outputs": _structured_outputs,
    "guided_json": _json,
    "guided_regex": _KINDS["regex"],
    "guided_choice": _KINDS["choice"],
    "guided_grammar": _grammar,
    "guided_json_object": _flag,
    "format": _ollama,
}
"""What each field means; each gives None where it forces nothing."""
