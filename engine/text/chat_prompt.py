"""A conversation as token ids, with all that is needed to read its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import InvalidRequestError
from engine.sampling.opening import Opening
from engine.text.answers.formats import AnswerFormat, Kind
from engine.text.answers.openings import opening_of
from engine.text.answers.parser import AnswerParser
from engine.text.answers.reader import AnswerReader
from engine.text.answers.tool_calls import Types, parameter_types
from engine.text.templates.chat_template import ChatTemplate
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
        begins_thoughts: whether the model itself may begin its answer with a thought.
    """

    text: str
    token_ids: tuple[int, ...]
    markers: AnswerFormat
    shown_ids: frozenset[int]
    types: Types
    calls_as_text: bool
    begins_thoughts: bool = True

    def opening(self) -> Opening | None:
        """What may come before the text of an answer that a constraint is about; None where nothing may.

        Raises:
            InvalidRequestError: answers have a structure that a constraint cannot go with.
        """
        return opening_of(self.markers, self.text[-_TAIL:], begins_thoughts=self.begins_thoughts)

    def reader(self, *, constrained: bool = False) -> AnswerReader | None:
        """A reader for one answer; None where answers have no structure.

        Args:
            constrained: behind thoughts and heads, all is the answer's text: a constraint leaves no room for calls.
        """
        if self.markers.plain:
            return None
        if constrained:
            marks = tuple(one for one in self.markers.marks if one.kind is Kind.REASONING)
            markers = replace(self.markers, marks=marks, bare_calls=frozenset())
            return AnswerReader(AnswerParser(markers, self.text[-_TAIL:], verbatim=True))
        return AnswerReader(
            AnswerParser(self.markers, self.text[-_TAIL:], self.types), calls_as_text=self.calls_as_text
        )


def chat_prompt(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Any], variables: Mapping[str, Any]
) -> ChatPrompt:
    """Renders a conversation and encodes it.

    Raises:
        InvalidRequestError: the template refuses the messages, or a variable has a name of its own kind.
    """
    if "messages" in variables:
        raise InvalidRequestError("a variable of the chat template cannot be named messages")
    text = template.render(list(messages), **variables)
    variant, tools = variables.get("template"), variables.get("tools")
    values = {name: value for name, value in variables.items() if name not in ("template", "tools")}
    markers = template.answer_format(variant, tools, values)
    ids = (tokenizer.token_id(name) for name in markers.token_names())
    return ChatPrompt(
        text=text,
        token_ids=tuple(tokenizer.encode_rendered(text)),
        markers=markers,
        shown_ids=frozenset(id for id in ids if id is not None and id not in tokenizer.eog_ids),
        types=parameter_types(tools),
        calls_as_text=not template.takes_calls(variant, tools, values),
        begins_thoughts=not template.opens_thoughts(variant, tools, values),
    )
