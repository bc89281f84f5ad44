"""Bodies of requests: bytes to a checked object. Unknown fields are noted, wrong ones are refused by name."""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect, Request

from engine.serve.errors import ApiError

log = logging.getLogger("engine.serve")

# Lists of fields: the first entry of another type ends the check. pydantic would otherwise note each wrong one, in 5 kB
# and 20 us, before any is told. Lists of several types are list[Any], checked where they are used: trying several types
# for each entry takes 1 to 3 us, during which no other request is served.
Integers = Annotated[list[int], Field(fail_fast=True)]
Strings = Annotated[list[str], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class Body(BaseModel):
    """A request's body: JSON with the declared fields, each of exactly the declared type; null is the default.

    Attributes:
        unsupported: fields that change the answer and are not supported yet, with the values that mean "off".
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=(), defer_build=True)
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}


B = TypeVar("B", bound=Body)


async def read_body(request: Request, kind: type[B]) -> B:
    """The checked body of a request.

    Raises:
        ApiError: 400; names the first field that is wrong.
        ClientDisconnect: the client has gone.
    """
    raw = await request.body()
    return parse_body(raw, kind, request.url.path)


def parse_body(raw: bytes, kind: type[B], path: str) -> B:
    """read_body() of bytes that are there."""
    try:
        body = kind.model_validate_json(raw or b"{}")
    except ValidationError as error:
        raise _refusal(error) from None
    extra = body.model_extra or {}
    if log.isEnabledFor(logging.DEBUG):
        for name in extra:
            if name not in kind.unsupported:
                log.debug("%s: the field %r is not known and ignored", path, name)
    for name, off in kind.unsupported.items():
        value = extra.get(name)
        if value is not None and value not in off:
            raise ApiError(
                400,
                f"{name} is not supported by this server yet; leave it out",
                param=name,
                code="unsupported_parameter",
            )
    return body


def _refusal(error: ValidationError) -> ApiError:
    """The first complaint, without the names of alternatives that pydantic puts into the place."""
    complaints = error.errors(include_url=False, include_context=False)
    first = complaints[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    place = _place(first["loc"])
    if not place:
        return ApiError(400, f"the body must be a JSON object: {first['msg']}", code="invalid_type")
    if first["type"] == "missing":
        return ApiError(400, f"the field {place} is missing", param=place, code="missing_required_parameter")
    same = [one["msg"] for one in complaints if one["loc"][0] == first["loc"][0]]
    wanted = "; or ".join(dict.fromkeys(message[0].lower() + message[1:] for message in same[:4]))
    found = repr(first["input"])
    found = found if len(found) <= 80 else found[:77] + "..."
    return ApiError(400, f"{place} is {found}: {wanted}", param=place, code="invalid_type")


def _place(loc: tuple[int | str, ...]) -> str:
    """messages[0].content for the path of keys and indices."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            text += f".{part}" if text else part
        else:
            break
    return text


__all__ = ["Body", "ClientDisconnect", "Integers", "Objects", "Strings", "parse_body", "read_body"]
