"""What a chat template takes, found out by rendering probes: strings or parts, which roles, which keys.

A template is a function that renders messages here; independent of jinja2 and tokens.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from engine.text.probes import CALL, CALL_NAME, CALL_VALUE, RESULT, THOUGHT, TOOLS, WORDS
from engine.text.templates.messages import REASONING_KEYS, checked_messages

Render = Callable[[list[dict[str, Any]], dict[str, Any]], str | None]
"""Messages and further names → the text, or None where the template refuses them or fails."""


class Shape(Enum):
    """A form in which a template takes the text of a message."""

    STRING = "string"
    PARTS = "parts"  # any number of text parts
    ONE_PART = "one part"  # of several it reads the first


class NoContent(Enum):
    """What a message of calls alone has as its content."""

    EMPTY = "empty"
    NONE = "none"
    ABSENT = "absent"


@dataclass(frozen=True)
class Habits:
    """What one template takes. The defaults are those of a template that takes plain strings and refuses no role.

    Attributes:
        shapes: forms of the text by role; a role that is missing could not be tried out.
        lost: roles whose text the template leaves out in every form, without an error.
        knows_developer: whether it has a place for the role "developer".
        no_content: what a message of calls alone has as its content.
        reads_calls: whether it writes "tool_calls"; None where that could not be tried out.
        reasoning_key: the key of an assistant's message under which it reads reasoning; None: under none.
        reasoning_part: whether it reads reasoning as a part of the content of type "thinking".
        reasoning_alone: whether it refuses a text beside reasoning and calls.
        samples: what it wrote for calls and for reasoning.
    """

    shapes: Mapping[str, frozenset[Shape]] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    knows_developer: bool = False
    no_content: NoContent = NoContent.EMPTY
    reads_calls: bool | None = None
    reasoning_key: str | None = None
    reasoning_part: bool = False
    reasoning_alone: bool = False
    samples: tuple[str, ...] = ()


_USER = {"role": "user", "content": "Hello"}
_THINK: dict[str, Any] = {  # names that make templates keep reasoning of earlier turns
    "enable_thinking": True,
    "thinking": True,
    "thinking_mode": "thinking",
    "preserve_thinking": True,
    "clear_thinking": False,
    "drop_thinking": False,
    "truncate_history_thinking": False,
}
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_PRINTED = re.compile(r"""['"]text['"]\s*:\s*['"]$""")  # a part written out as a mapping
_PRINTED_THOUGHT = re.compile(r"""['"]thinking['"]\s*:""")
_NOTHING = re.compile(r"\b(?:None|null|none)\b")
_TESTS_NONE = re.compile(r"(?:\bis(?:\s+not)?|[!=]=)\s*none\b", re.IGNORECASE)


def learn(source: str, render: Render) -> Habits:
    """Tries a template out with some twenty short conversations.

    Args:
        source: its text, for what no rendered conversation shows.
        render: renders messages with it.
    """
    source = _COMMENT.sub("", source)
    if render([_USER], {}) is None and render([_USER], {"tools": TOOLS}) is not None:
        render = _always_with_tools(render)
    no_content, call_sample = _calls(source, render)
    shapes: dict[str, frozenset[Shape]] = {}
    lost = set()
    for role in ("user", "system", "assistant", "tool"):
        taken, tried = _shapes(role, render, no_content)
        if taken:
            shapes[role] = taken
        elif tried:
            lost.add(role)
    key, part, samples = _reasoning(render, no_content)
    alone = False
    if key is not None and call_sample:
        alone = _with_calls(render, {"content": WORDS[0], key: THOUGHT}) is None
    developer = render([{"role": "developer", "content": WORDS[0]}, _USER], {}) if "developer" in source else None
    return Habits(
        shapes=shapes,
        lost=frozenset(lost),
        knows_developer=_kept(developer, WORDS[0]),
        no_content=no_content,
        reads_calls=None if call_sample is None else bool(call_sample),
        reasoning_key=key,
        reasoning_part=part,
        reasoning_alone=alone,
        samples=(*samples, *([call_sample] if call_sample else [])),
    )


def _always_with_tools(render: Render) -> Render:
    return lambda messages, names: render(messages, {"tools": TOOLS, **names})


def _kept(text: str | None, *words: str) -> bool:
    """Whether all words are in the text, and not as part of a mapping that was written out."""
    if text is None:
        return False
    text = text.casefold()
    for word in words:
        before, found, _ = text.partition(word.casefold())
        if not found or _PRINTED.search(before[-20:]):
            return False
    return True


def _call_message(values: Mapping[str, Any]) -> dict[str, Any]:
    return checked_messages([{"role": "assistant", "content": "", "tool_calls": [CALL]}])[0] | dict(values)


def _with_calls(render: Render, values: Mapping[str, Any], *more: dict[str, Any]) -> str | None:
    """A conversation with a call whose message has these values; without its result where the template refuses one."""
    message = {key: value for key, value in _call_message(values).items() if value is not NoContent.ABSENT}
    for rest in ((RESULT, *more), more, (RESULT, *more, _USER)):
        text = render([_USER, message, *rest], {"tools": TOOLS})
        if text is not None:
            return text
    return None


def _calls(source: str, render: Render) -> tuple[NoContent, str | None]:
    """The content of a message of calls alone, and what the template writes then; "" where it leaves calls out."""
    contents = {NoContent.EMPTY: "", NoContent.NONE: None, NoContent.ABSENT: NoContent.ABSENT}
    texts = {kind: _with_calls(render, {"content": content}) for kind, content in contents.items()}
    plain = render([_USER], {"tools": TOOLS}) or ""
    name = re.compile(re.escape(CALL_NAME))

    def shows(kind: NoContent) -> bool:
        text = texts[kind]
        if text is None or len(name.findall(text)) <= len(name.findall(plain)) or CALL_VALUE not in text:
            return False
        return len(_NOTHING.findall(text)) <= len(_NOTHING.findall(texts[NoContent.EMPTY] or plain))

    empty, none = texts[NoContent.EMPTY], texts[NoContent.NONE]
    if shows(NoContent.NONE) and empty != none and (_TESTS_NONE.search(source) or not shows(NoContent.EMPTY)):
        return NoContent.NONE, none
    for kind in (NoContent.EMPTY, NoContent.NONE, NoContent.ABSENT):
        if shows(kind):
            return kind, texts[kind]
    return NoContent.EMPTY, None if all(text is None for text in texts.values()) else ""


def _talk(role: str, content: Any, no_content: NoContent) -> list[list[dict[str, Any]]]:
    """Conversations in which a template may take a message of a role; the first that is not refused counts."""
    message = {"role": role, "content": content}
    if role == "system":
        return [[message, _USER]]
    if role == "assistant":
        return [[_USER, message, _USER]]
    if role == "tool":
        call = _call_message({"content": None if no_content is NoContent.NONE else ""})
        if no_content is NoContent.ABSENT:
            del call["content"]
        return [[_USER, call, RESULT | message], [_USER, call, RESULT | message, _USER]]
    return [[message], [{"role": "system", "content": "Hi"}, message]]


def _shapes(role: str, render: Render, no_content: NoContent) -> tuple[frozenset[Shape], bool]:
    """The forms in which the text of a role appears, and whether the template took any without an error."""
    first, second = ({"type": "text", "text": word} for word in WORDS)
    contents: dict[Shape, Any] = {Shape.STRING: WORDS[0], Shape.PARTS: [first, second], Shape.ONE_PART: [first]}
    taken, tried = set(), False
    for shape, content in contents.items():
        for talk in _talk(role, content, no_content):
            text = render(talk, {"tools": TOOLS} if role == "tool" else {})
            if text is not None:
                tried = True
                if _kept(text, *(WORDS if shape is Shape.PARTS else WORDS[:1])):
                    taken.add(shape)
                break
    return frozenset(taken), tried


def _reasoning(render: Render, no_content: NoContent) -> tuple[str | None, bool, list[str]]:
    """The key under which reasoning is read, whether a part of the content is, and what was written of it."""
    content = {NoContent.EMPTY: "", NoContent.NONE: None, NoContent.ABSENT: NoContent.ABSENT}[no_content]

    def found(said: Any, values: dict[str, Any]) -> str | None:
        answer = {"role": "assistant", "content": said, **values}
        for names in ({}, _THINK):
            for talk in ([_USER, answer], [_USER, answer, _USER]):
                text = render(talk, {"add_generation_prompt": talk[-1] is not answer, **names})
                if text is not None and THOUGHT in text:
                    return text
        return None

    for key in (*REASONING_KEYS, "tool_plan"):
        text = found(WORDS[0], {key: THOUGHT}) if key != "tool_plan" else None
        if text is None:
            called = _with_calls(render, {"content": content, key: THOUGHT})
            text = called if called is not None and THOUGHT in called else None
        if text is not None:
            return key, False, [text]
    parts = [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": WORDS[0]}]
    text = found(parts, {})
    if _kept(text, THOUGHT, WORDS[0]) and text is not None and not _PRINTED_THOUGHT.search(text):
        return None, True, [text]
    return None, False, []
