"""Chat templates: a conversation → the prompt text the model was trained on, by the file's own jinja2 template.

Of the tokenizer only the names of its special tokens are used.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from engine.concurrency import fork
from engine.errors import InvalidRequestError, TokenizerError
from engine.text.answers.call_form import CallForm
from engine.text.answers.call_forms import choose_form
from engine.text.answers.formats import MARKS, AnswerFormat, Kind, choose_format
from engine.text.answers.parser import AnswerParser
from engine.text.probes import CALL_VALUE, THOUGHT
from engine.text.templates.habits import Habits
from engine.text.templates.message_shape import into_users, loses_instructions, shaped, without_system
from engine.text.templates.messages import checked_messages, checked_tools
from engine.text.templates.render import check_not_lost, compiled_template, learned, rendered
from engine.text.tokenizers.special_tokens import TokenType
from engine.text.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

logger = logging.getLogger(__name__)

_KEY = "tokenizer.chat_template"
_TOOL_VARIANT = "tool_use"


class ChatTemplate:
    """The chat template of a model, and its named variants. Safe to share between threads.

    Args:
        source: jinja2 text of the default template.
        variants: further templates by name.
        special_tokens: what templates know as `bos_token`, `eos_token` … , by these names.
        marker_tokens: those markers of reasoning and calls that are tokens of the model's own.
        now: the clock behind `strftime_now`.
    """

    def __init__(
        self,
        source: str,
        *,
        variants: Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        marker_tokens: Collection[str] = (),
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.source = source
        self.variants = dict(variants or {})
        self.special_tokens = dict(special_tokens or {})
        self._marker_tokens = marker_tokens
        self._now = now
        self._compiled: dict[str, Template] = {}
        self._habits: dict[tuple[str | None, tuple[str, ...]], Habits] = {}
        self._formats: dict[str, AnswerFormat] = {}
        self._opens: dict[str, bool] = {}
        self._warned: set[str] = set()
        self._lock = fork.new_lock()

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
        return cls(
            source,
            variants=variants,
            special_tokens=_special_tokens(tokenizer),
            marker_tokens=_marker_tokens(tokenizer),
        )

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
            messages: see `engine.text.templates.messages.checked_messages`.
            tools: JSON schemas of the tools the model may call; picks the variant "tool_use" where there is one.
            add_generation_prompt: end with the opening of the assistant's turn.
            template: name of a variant to use.
            values: further names for the template (`enable_thinking=False`, `date_string="…"`).

        Raises:
            InvalidRequestError: the messages are malformed, or the template does not take them.
            TokenizerError: the template has an error or does not end.
        """
        checked, tools = checked_messages(messages), checked_tools(tools)
        template = self._chosen(template, tools)
        compiled, habits = self.compile(template), self.habits(template, values)
        names = {
            **self.special_tokens,
            **values,
            "tools": tools,
            "documents": values.get("documents"),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        taken = shaped([self._apart(message, template, values) for message in checked], habits)
        has_system = any(message["role"] == "system" for message in taken)
        if has_system and "system" in habits.lost and "user" in habits.shapes:
            self._warn_of_system()
            return rendered(compiled, names, into_users(taken))
        text, refusal = None, None
        try:
            text = rendered(compiled, names, taken)
        except InvalidRequestError as error:
            refusal = error
        if text is None or loses_instructions(taken, text):
            for other in without_system(taken):
                try:
                    told = rendered(compiled, names, other)
                except InvalidRequestError:
                    continue
                if text is None or not loses_instructions(taken, told):
                    self._warn_of_system()
                    return told
        if text is None:
            assert refusal is not None, "there is a text or a refusal"
            raise refusal
        if "content" in self._source(template):
            check_not_lost(taken, habits, text)
        elif "user" in habits.lost:
            self._warn("text", "the model's chat template reads no content of messages: what is said is lost")
        return text

    def habits(self, template: str | None = None, values: Mapping[str, Any] | None = None) -> Habits:
        """What the default template or a named variant takes; found out by rendering probes, once.

        Args:
            template: name of a variant.
            values: names for the template, in case it renders nothing without them.
        """
        compiled, source = self.compile(template), self._source(template)
        found = self._habits.get((template, ()))
        if found is None:
            found = self._habits[template, ()] = learned(compiled, source, self.special_tokens)
        if found.shapes or found.lost or not values:
            return found
        key = (template, tuple(sorted(values)))
        if key not in self._habits:
            self._habits[key] = learned(compiled, source, {**self.special_tokens, **values})
        return self._habits[key]

    def reads(self, name: str, template: str | None = None) -> bool:
        """Whether a template, the default one or a variant, mentions a name outside of its comments."""
        return re.search(rf"\b{name}\b", re.sub(r"\{#.*?#\}", "", self._source(template), flags=re.DOTALL)) is not None

    def takes_calls(
        self, template: str | None = None, tools: Any = None, values: Mapping[str, Any] | None = None
    ) -> bool:
        """Whether the template that a conversation gets reads calls from their key of a message."""
        return self.habits(self._chosen(template, tools), values).reads_calls is True

    def answer_format(
        self, template: str | None = None, tools: Any = None, values: Mapping[str, Any] | None = None
    ) -> AnswerFormat:
        """How the model marks reasoning and calls in its answers.

        Args:
            template: name of a variant.
            tools: the tools that it may call: calls of these may come without a marker, if the template writes them so.
            values: names for the template, in case it renders nothing without them.
        """
        tools = checked_tools(tools)
        template = self._chosen(template, tools)
        habits = self.habits(template, values)
        found = self._formats.get(template or "")
        if found is None:
            found = choose_format(self._source(template), habits.samples, self._marker_tokens)
            self._formats[template or ""] = found
        if tools and habits.reads_calls and found.channels is None:
            written = habits.samples[-1].rpartition(CALL_VALUE)[0][-300:]
            if not any(marks.kind is Kind.CALLS and marks.begin in written for marks in found.marks):
                names = (tool.get("function", tool) for tool in tools)
                bare = frozenset(str(one.get("name")) for one in names if isinstance(one, Mapping))
                return replace(found, bare_calls=bare)
        return found

    def call_form(
        self, template: str | None = None, tools: Any = None, values: Mapping[str, Any] | None = None
    ) -> CallForm:
        """How the model writes calls, by what the template makes of one; see answer_format() for the arguments."""
        template = self._chosen(template, checked_tools(tools))
        habits = self.habits(template, values)
        markers = self.answer_format(template, None, values)
        return choose_form(markers, self._source(template), habits.samples[-1] if habits.reads_calls else None)

    def reasoning_end(
        self, template: str | None = None, tools: Any = None, values: Mapping[str, Any] | None = None
    ) -> tuple[str, str]:
        """What ends a thought, with the white space that the template puts around it, and a word that may not follow.

        "" where answers have no reasoning.
        """
        template = self._chosen(template, checked_tools(tools))
        markers = self.answer_format(template, None, values)
        if markers.channels is not None:
            form = choose_form(markers, self._source(template), None)
            begin, end = form.thought
            opener = form.begin if begin.startswith(form.begin) else ""
            return (end + opener, begin.removeprefix(opener).partition("<")[0] if opener else "") if end else ("", "")
        for sample in self.habits(template, values).samples:
            for marks in markers.marks:
                if marks.kind is not Kind.REASONING or not marks.ends:
                    continue
                found = re.search(rf"{THOUGHT}(\s*){re.escape(marks.ends[0])}(\s*)", sample)
                if found is not None:
                    return found[1] + marks.ends[0] + found[2], ""
        ends = (marks.ends[0] for marks in markers.marks if marks.kind is Kind.REASONING and marks.ends)
        return next(ends, ""), ""

    def opens_thoughts(
        self, template: str | None = None, tools: Any = None, values: Mapping[str, Any] | None = None
    ) -> bool:
        """Whether the template itself opens a thought when it is asked to; then the model never begins one unasked."""
        template = self._chosen(template, checked_tools(tools))
        found = self._opens.get(template or "")
        if found is None:
            marks = self.answer_format(template, None, values).marks
            begins = tuple(one.begin for one in marks if one.kind is Kind.REASONING)
            asked = {**(values or {}), "enable_thinking": True, "thinking": True}
            try:
                text = self.render([{"role": "user", "content": "?"}], template=template, **asked) if begins else ""
            except (InvalidRequestError, TokenizerError):
                text = ""
            found = self._opens[template or ""] = text.rstrip().endswith(begins) and bool(begins)
        return found

    def _apart(self, message: dict[str, Any], template: str | None, values: Mapping[str, Any]) -> dict[str, Any]:
        """An assistant's message that is an answer with channels as the model wrote it, taken apart."""
        content = message.get("content")
        if message["role"] != "assistant" or not isinstance(content, str):
            return message
        markers = self.answer_format(template, None, values)
        if markers.channels is None or not content.lstrip().startswith(markers.channels.opens):
            return message
        parser = AnswerParser(markers, markers.channels.opens[0] + "assistant")
        pieces = parser.push(content), parser.finish()
        calls = [call.as_dict() for piece in pieces for call in piece.tool_calls]
        apart = {
            "content": "".join(piece.content for piece in pieces),
            "reasoning_content": "".join(piece.reasoning for piece in pieces),
            "tool_calls": calls,
        }
        return checked_messages([{**message, **{key: value for key, value in apart.items() if value != []}}])[0]

    def _chosen(self, template: str | None, tools: Any) -> str | None:
        """The name of the variant to use; None for the default template."""
        return _TOOL_VARIANT if template is None and tools and _TOOL_VARIANT in self.variants else template

    def _source(self, name: str | None) -> str:
        return self.source if name is None else self.variants[name]

    def _warn_of_system(self) -> None:
        self._warn(
            "system",
            "the model's chat template takes no system message in its place: its text goes before the user's text",
        )

    def _warn(self, what: str, text: str) -> None:
        """Warn once for each template."""
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(text)

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
                found = self._compiled[name or ""] = compiled_template(self._source(name), self._now)
            return found


def _special_tokens(tokenizer: Tokenizer | None) -> dict[str, str]:
    if tokenizer is None:
        return {}
    ids = tokenizer.special_ids
    roles = ("bos", "eos", "unk", "pad", "sep", "mask")
    return {f"{role}_token": tokenizer.token_text(ids[role]) for role in roles if role in ids}


def _marker_tokens(tokenizer: Tokenizer | None) -> frozenset[str]:
    if tokenizer is None:
        return frozenset()
    own = (TokenType.CONTROL, TokenType.USER_DEFINED)
    ids = {marks.begin: tokenizer.token_id(marks.begin) for marks in MARKS}
    return frozenset(begin for begin, id in ids.items() if id is not None and tokenizer.token_type(id) in own)
