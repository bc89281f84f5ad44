"""Compiles and renders one chat template within its limits, and probes it; its errors say what went wrong."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequestError, TokenizerError
from engine.text.templates.habits import Habits, learn
from engine.text.templates.message_shape import texts

if TYPE_CHECKING:
    from jinja2 import Template

_MAX_SOURCE = 1_000_000  # characters; real templates have at most some 20 thousand


def compiled_template(source: str, now: Callable[[], datetime]) -> "Template":
    """A template ready to render.

    Raises:
        TokenizerError: it does not parse, or is too long.
    """
    from jinja2.exceptions import TemplateSyntaxError

    from engine.text.templates.sandbox import ChatEnvironment

    if len(source) > _MAX_SOURCE:
        raise TokenizerError(f"the model's chat template has {len(source)} characters; at most {_MAX_SOURCE} are taken")
    try:
        return ChatEnvironment(now).from_string(source)
    except TemplateSyntaxError as error:
        raise TokenizerError(
            f"the model's chat template does not parse, line {error.lineno}: {error.message}"
        ) from None
    except Exception as error:
        raise TokenizerError(
            f"the model's chat template cannot be compiled: {str(error) or type(error).__name__}"
        ) from error


def rendered(compiled: "Template", names: Mapping[str, Any], messages: list[dict[str, Any]]) -> str:
    """The text of shaped messages; raises as `ChatTemplate.render` does."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    from engine.text.templates.sandbox import TemplateRefusal, start_budget

    names = {**names, "messages": messages}
    start_budget(names)
    try:
        return _joined(compiled.generate(names))
    except TemplateRefusal as error:
        raise InvalidRequestError(f"the model's chat template does not take these messages: {error}") from None
    except (SecurityError, RecursionError, MemoryError, TemplateSyntaxError) as error:
        raise TokenizerError(f"the model's chat template was stopped: {str(error) or type(error).__name__}") from error
    except Exception as error:
        given = {name: value for name, value in names.items() if value is not None}
        if len(given) < len(names):  # some walk the tools unasked: they fail with None, not without a name
            with suppress(InvalidRequestError):
                return rendered(compiled, given, messages)
        raise InvalidRequestError(
            f"the model's chat template failed on these messages ({type(error).__name__}: {error}); check the "
            "roles, their order and the keys it uses"
        ) from error


def learned(compiled: "Template", source: str, values: Mapping[str, Any]) -> Habits:
    """The habits of a template; those of a plain one where it exhausts its limits."""
    from engine.text.templates.sandbox import MAX_SECONDS, TemplateLimitError, start_budget

    deadline = time.monotonic() + MAX_SECONDS

    def render(messages: list[dict[str, Any]], names: dict[str, Any]) -> str | None:
        common = {"tools": None, "documents": None, "add_generation_prompt": True}
        everything = {**values, **common, **names, "messages": [dict(message) for message in messages]}
        start_budget(everything)
        if time.monotonic() > deadline:
            raise TemplateLimitError("trying it out takes too long")
        try:
            return _joined(compiled.generate(everything))
        except (TemplateLimitError, MemoryError):
            raise
        except Exception:
            return None

    try:
        return learn(source, render)
    except (TemplateLimitError, MemoryError):
        return Habits()


def check_not_lost(messages: list[dict[str, Any]], habits: Habits, text: str) -> None:
    """Refuses to render a conversation without the text of a role that the template leaves out.

    Raises:
        InvalidRequestError: none of the text of such a role is in the prompt.
    """
    known = {"user", "system", "assistant", "tool"} - habits.lost
    for role in dict.fromkeys(message["role"] for message in messages if message["role"] not in known):
        said = [piece.strip() for message in messages if message["role"] == role for piece in texts(message)]
        if any(said) and not any(piece[:40] in text for piece in said if piece):
            raise InvalidRequestError(
                f"the model's chat template loses the text of messages of the role {role!r}, be it a string or a list "
                "of parts; leave them out, or give a template that writes them (chat_template, --chat-template-file)"
            )


def _joined(parts: Any) -> str:
    from engine.text.templates.sandbox import MAX_SIZE, TemplateLimitError

    pieces: list[str] = []
    size = 0
    for part in parts:
        size += len(part)
        if size > MAX_SIZE:
            raise TemplateLimitError(f"it writes more than {MAX_SIZE} characters")
        pieces.append(part)
    return "".join(pieces)
