"""Chat templates: a conversation → the prompt text the model was trained on, by the file's own jinja2 template.

This module knows the tokenizer only by the names of its special tokens.
"""

import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequestError, TokenizerError
from engine.text.messages import checked_messages, checked_tools
from engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

_KEY = "tokenizer.chat_template"
_TOOL_VARIANT = "tool_use"
_MAX_SOURCE = 1_000_000  # characters; real templates have at most some 20 thousand


class ChatTemplate:
    """The chat template of a model, and its named variants. Safe to share between threads.

    Args:
        source: jinja2 text of the default template.
        variants: further templates by name.
        special_tokens: what templates know as `bos_token`, `eos_token` … , by these names.
        now: the clock behind `strftime_now`.
    """

    def __init__(
        self,
        source: str,
        *,
        variants: Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.source = source
        self.variants = dict(variants or {})
        self.special_tokens = dict(special_tokens or {})
        self._now = now
        self._compiled: dict[str, Template] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer | None) -> "ChatTemplate | None":
        """The template of a GGUF file, or None where it has none. It is compiled at its first use.

        Raises:
            TokenizerError: the metadata holds a template that is not a string.
        """
        variants: dict[str, str] = {}
        for key, value in metadata.items():
            if key == _KEY or key.startswith(_KEY + "."):
                if not isinstance(value, str):
                    raise TokenizerError(f"{key} must be a string, found {type(value).__name__}")
                variants[key[len(_KEY) + 1 :]] = value
        if not variants:
            return None
        source = variants.pop("", None)
        if source is None:  # a file with named templates only: "default" is the default, else the first
            source = variants.get("default", next(iter(variants.values())))
        return cls(source, variants=variants, special_tokens=_special_tokens(tokenizer))

    def render(
        self,
        messages: Any,
        *,
        tools: Any = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **values: Any,
    ) -> str:
        """The prompt text of a conversation; encode it with `Tokenizer.encode_rendered`, which adds no second BOS.

        Args:
            messages: see `engine.text.messages.checked_messages`.
            tools: JSON schemas of the tools the model may call; picks the variant "tool_use" where there is one.
            add_generation_prompt: end with the opening of the assistant's turn.
            template: name of a variant to use.
            values: further names for the template (`enable_thinking=False`, `date_string="…"`).

        Raises:
            InvalidRequestError: the messages are malformed, or the template does not take them.
            TokenizerError: the template itself is broken or does not end.
        """
        from jinja2.exceptions import SecurityError, TemplateSyntaxError

        from engine.text.template_sandbox import TemplateRefusal, start_budget

        names = {
            **self.special_tokens,
            **values,
            "messages": checked_messages(messages),
            "tools": checked_tools(tools),
            "documents": values.get("documents"),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        if template is None and names["tools"] and _TOOL_VARIANT in self.variants:
            template = _TOOL_VARIANT
        start_budget()
        compiled = self.compile(template)
        try:
            return _joined(compiled.generate(names))
        except TemplateRefusal as error:
            raise InvalidRequestError(f"the model's chat template does not take these messages: {error}") from None
        except (SecurityError, RecursionError, MemoryError, TemplateSyntaxError) as error:
            raise TokenizerError(
                f"the model's chat template was stopped: {str(error) or type(error).__name__}"
            ) from error
        except Exception as error:
            raise InvalidRequestError(
                f"the model's chat template failed on these messages ({type(error).__name__}: {error}); check the "
                "roles, their order and the keys it uses"
            ) from error

    def compile(self, name: str | None = None) -> "Template":
        """The default template or a named variant, ready to render; made once.

        Raises:
            InvalidRequestError: there is none of that name.
            TokenizerError: it does not parse.
        """
        if name is not None and name not in self.variants:
            known = ", ".join(map(repr, self.variants)) or "none"
            raise InvalidRequestError(f"the model has no chat template named {name!r}; its named ones: {known}")
        with self._lock:
            found = self._compiled.get(name or "")
            if found is None:
                source = self.source if name is None else self.variants[name]
                found = self._compiled[name or ""] = _compiled(source, self._now)
            return found


def _compiled(source: str, now: Callable[[], datetime]) -> "Template":
    from jinja2.exceptions import TemplateSyntaxError

    from engine.text.template_sandbox import ChatEnvironment

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


def _joined(parts: Any) -> str:
    from engine.text.template_sandbox import MAX_SIZE, TemplateLimitError

    pieces: list[str] = []
    size = 0
    for part in parts:
        size += len(part)
        if size > MAX_SIZE:
            raise TemplateLimitError(f"it writes more than {MAX_SIZE} characters")
        pieces.append(part)
    return "".join(pieces)


def _special_tokens(tokenizer: Tokenizer | None) -> dict[str, str]:
    if tokenizer is None:
        return {}
    ids = tokenizer.special_ids
    roles = ("bos", "eos", "unk", "pad", "sep", "mask")
    return {f"{role}_token": tokenizer.token_text(ids[role]) for role in roles if role in ids}
