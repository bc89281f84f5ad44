"""A conversation as token ids, with all that is needed to read its answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import InvalidRequestError
from engine.sampling.opening import Opening
from engine.text.answers.call_form import CallForm
from engine.text.answers.call_forms import form_named
from engine.text.answers.formats import MARKS, AnswerFormat, Kind, Marks
from engine.text.answers.openings import opening_of
from engine.text.answers.parser import AnswerParser
from engine.text.answers.reader import AnswerReader
from engine.text.answers.rules import AnswerRules, CallRules, argument_schemas, choose_tools
from engine.text.answers.thoughts import ReasoningFormat, budget_of
from engine.text.answers.tool_calls import Types, parameter_types
from engine.text.templates.chat_template import ChatTemplate
from engine.text.templates.messages import checked_tools
from engine.text.templates.told_tools import with_tools
from engine.text.tokenizers.tokenizer import Tokenizer

_TAIL = 4000
"""Characters at the end of a prompt that are looked at for what it has begun."""


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation.

    Attributes:
        text: the prompt.
        token_ids: the same as tokens.
        markers: how the model marks reasoning and calls.
        shown_ids: control tokens that must stay in the answer's text for its reader.
        types: types of the parameters of the tools.
        calls_as_text: whether the template takes calls only as text.
        rules: what the answer is held to: calls of tools, and the length of its reasoning.
        begins_thoughts: whether the model itself may begin its answer with a thought.
        thoughts: where they go.
    """

    text: str
    token_ids: tuple[int, ...]
    markers: AnswerFormat
    shown_ids: frozenset[int]
    types: Types
    calls_as_text: bool
    rules: AnswerRules | None = None
    begins_thoughts: bool = True
    thoughts: ReasoningFormat = ReasoningFormat.AUTO

    def opening(self) -> Opening | None:
        """What may come before the text of an answer that a constraint is about; None where nothing may.

        Raises:
            InvalidRequestError: answers have a structure that a constraint cannot go with.
        """
        return opening_of(self.markers, self.text[-_TAIL:], begins_thoughts=self.begins_thoughts)

    def reader(self, *, constrained: bool = False, key: str | None = None) -> AnswerReader | None:
        """A reader for one answer; None where answers have no structure.

        Args:
            constrained: the text has a constraint: behind thoughts and heads, all is text, if it does not begin with a
                call of a tool. Where calls are forced, there is no text that a constraint could be about.
            key: the same one gives calls the same ids again, when an answer is read a second time.
        """
        if self.markers.plain:
            return None
        calls = None if self.rules is None else self.rules.calls
        if constrained and not (calls is not None and calls.forced):
            kinds = (Kind.REASONING,) if calls is None else (Kind.REASONING, Kind.CALLS)
            marks = tuple(one for one in self.markers.marks if one.kind in kinds)
            markers = replace(self.markers, marks=marks, bare_calls=frozenset())
            return AnswerReader(self._parser(markers, key, verbatim=True), calls_as_text=self.calls_as_text)
        return AnswerReader(self._parser(self.markers, key), calls_as_text=self.calls_as_text)

    def _parser(self, markers: AnswerFormat, key: str | None, *, verbatim: bool = False) -> AnswerParser:
        return AnswerParser(
            markers,
            self.text[-_TAIL:],
            self.types,
            sections=self.rules.sections() if self.rules is not None else None,
            thoughts=self.thoughts,
            verbatim=verbatim,
            key=key,
        )


def chat_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Any],
    variables: Mapping[str, Any],
    tool_format: str = "auto",
    reasoning_format: str = "auto",
    check: Callable[[str], None] = lambda _: None,
) -> ChatPrompt:
    """Renders a conversation and encodes it.

    Args:
        template: of the model.
        tokenizer: of the model.
        messages: the conversation.
        variables: names for the template; `tools`, `tool_choice`, `parallel_tool_calls` and `max_reasoning_tokens` and
            `reasoning_format` are about the answer; `reasoning_effort` is so too where the template does not read it.
        tool_format: name of a form of calls, or "auto".
        reasoning_format: where thoughts go, where the variables do not say so.
        check: called with the text before it is encoded; may refuse it.

    Raises:
        InvalidRequestError: the template refuses the messages, a variable has a name of its own kind, or what is asked
            about tools contradicts itself.
    """
    if "messages" in variables:
        raise InvalidRequestError("a variable of the chat template cannot be named messages")
    names = dict(variables)
    choice, parallel = names.pop("tool_choice", None), names.pop("parallel_tool_calls", None)
    thoughts = ReasoningFormat.parse(names.pop("reasoning_format", None) or reasoning_format)
    budget = budget_of(
        names.pop("max_reasoning_tokens", None),
        names.get("reasoning_effort"),
        read_by_template=template.reads("reasoning_effort", names.get("template")),
    )
    tools = checked_tools(names.pop("tools", None))
    wanted = choose_tools(tools or (), choice, parallel)
    variant = names.get("template")
    values = {name: value for name, value in names.items() if name != "template"}
    offered = wanted.tools if wanted is not None else None
    text = template.render(list(messages), tools=offered, **names)
    markers = template.answer_format(variant, offered, values)
    calls = None
    if wanted is not None:
        form = form_named(tool_format) or template.call_form(variant, offered, values)
        calls = CallRules(form, argument_schemas(wanted), wanted.forced, wanted.several)
        markers = _knowing(markers, form, calls)
        if not any(name in text for name, _ in calls.tools):  # the template has no place for tools
            text = template.render(with_tools(messages, wanted.tools, form), **names)
    elif tools:  # none of them may be called: what looks like a call is text
        marks = tuple(marks for marks in markers.marks if marks.kind is not Kind.CALLS)
        markers = replace(markers, marks=marks, bare_calls=frozenset())
    ids = (tokenizer.token_id(name) for name in markers.token_names())
    shown = frozenset(id for id in ids if id is not None and id not in tokenizer.eog_ids)
    types = parameter_types(offered)
    end, banned = template.reasoning_end(variant, offered, values) if budget is not None else ("", "")
    limit = budget if end else None
    rules = None
    if calls is not None or limit is not None:
        rules = AnswerRules(markers, text[-_TAIL:], types, shown, calls, limit, end, banned)
    check(text)
    return ChatPrompt(
        text=text,
        token_ids=tuple(tokenizer.encode_rendered(text)),
        markers=markers,
        shown_ids=shown,
        types=types,
        calls_as_text=not template.takes_calls(variant, offered, values),
        begins_thoughts=not template.opens_thoughts(variant, offered, values),
        rules=rules,
        thoughts=thoughts,
    )


def _knowing(markers: AnswerFormat, form: CallForm, calls: CallRules) -> AnswerFormat:
    """The format of answers with the markers of a form that the template itself may not have shown."""
    if form.opens or markers.channels is not None:
        return markers
    if not form.begin:
        return replace(markers, bare_calls=markers.bare_calls | {name for name, _ in calls.tools})
    if any(marks.begin == form.begin for marks in markers.marks):
        return markers
    known = next((marks for marks in MARKS if marks.begin == form.begin), None)
    marks = known or Marks(Kind.CALLS, form.begin, (form.end,) if form.end else ())
    return replace(markers, marks=(*markers.marks, marks))
