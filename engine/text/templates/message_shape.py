"""Gives checked messages the shape that a template takes, as `habits.py` has found it out.

Independent of templates and tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from engine.text.templates.habits import Habits, NoContent, Shape
from engine.text.templates.messages import REASONING_KEYS

Message = dict[str, Any]


def shaped(messages: Sequence[Message], habits: Habits) -> list[Message]:
    """Copies of checked messages with roles, contents and reasoning where the template looks for them."""
    return [_shaped(message, habits) for message in messages]


def without_system(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Ways to pass system messages, if any, to a template that refuses them, the smallest change first.

    One system message instead of several at the beginning; later ones before the text of the user that follows; all of
    them so; all of them before the first text of a user.
    """
    messages = [messages[0], *(_as_system(message) for message in messages[1:])]
    n_first = next((index for index, one in enumerate(messages) if one["role"] != "system"), len(messages))
    n_all = sum(message["role"] == "system" for message in messages)
    if n_first > 1:
        first = _joined(messages[:n_first])
        if n_all == n_first:
            yield [first, *messages[n_first:]]
    elif n_first == 1:
        first = messages[0]
    if 0 < n_first < n_all:
        yield [first, *into_users(messages[n_first:])]
    if n_all:
        yield into_users(messages)
        yield _merged(messages)


def loses_instructions(messages: Sequence[Message], text: str) -> bool:
    """Whether a prompt lacks what a system message behind the first says: many templates read only that one."""
    later = (message for message in messages[1:] if _as_system(message)["role"] == "system")
    return any(piece.strip() and piece.strip()[:40] not in text for message in later for piece in texts(message))


def _as_system(message: Message) -> Message:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _merged(messages: Sequence[Message]) -> list[Message]:
    """All system messages before the first text of a user; alone, they are what the user says."""
    system = [message for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    if not system:
        return others
    for index, message in enumerate(others):
        if message["role"] == "user":
            return [*others[:index], _before(_joined(system), message), *others[index + 1 :]]
    return [_joined(system) | {"role": "user"}, *others]


def texts(message: Message) -> list[str]:
    """The texts in a message's content."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or () if isinstance(part.get("text"), str)]


def into_users(messages: Sequence[Message]) -> list[Message]:
    """System messages before the text of the user that follows; the last ones, alone, are what the user says."""
    result: list[Message] = []
    waiting: list[Message] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message)
        elif message["role"] == "user" and waiting:
            result.append(_before(_joined(waiting), message))
            waiting = []
        else:
            result.append(message)
    return [*result, _joined(waiting) | {"role": "user"}] if waiting else result


def _joined(messages: Sequence[Message]) -> Message:
    text = "\n\n".join("\n".join(texts(message)) for message in messages)
    return {**messages[0], "content": text}


def _before(system: Message, user: Message) -> Message:
    """A user's message that begins with the text of a system message."""
    content = user["content"]
    text = "\n".join(texts(system))
    if not text:
        return user
    if isinstance(content, list):
        return {**user, "content": [{"type": "text", "text": text + "\n"}, *content]}
    return {**user, "content": f"{text}\n{content}" if content else text}


def _shaped(message: Message, habits: Habits) -> Message:
    message = dict(message)
    if message["role"] == "developer" and not habits.knows_developer:
        message["role"] = "system"
    content = message["content"]
    thought = next((message[key] for key in (*REASONING_KEYS, "tool_plan") if message.get(key)), None)
    if message["role"] == "assistant" and isinstance(thought, str):
        key = habits.reasoning_key
        if habits.reasoning_part and content is not None:
            said = [{"type": "text", "text": text} for text in texts(message) if text]
            message["content"] = [{"type": "thinking", "thinking": thought}, *said]
            return message
        if habits.reasoning_part:
            message["content"] = [{"type": "thinking", "thinking": thought}]
            return message
        if habits.reasoning_alone and key is not None and message.get("tool_calls") and any(texts(message)):
            thought = "\n\n".join([thought, *texts(message)])  # nothing of what was said is lost
            message[key], content = thought, None
        elif key is not None and not message.get(key):
            message[key] = thought
    if content is None or not any(texts(message)):  # parts without a text say no more than no content does
        message["content"] = content = ""
        if message.get("tool_calls"):
            if habits.no_content is NoContent.NONE:
                message["content"] = None
            elif habits.no_content is NoContent.ABSENT:
                del message["content"]
            return message
    shapes = habits.shapes.get(message["role"], habits.shapes.get("user", frozenset({Shape.STRING})))
    message["content"] = _content(content, shapes or frozenset({Shape.STRING}))
    return message


def _content(content: str | list[Message], shapes: frozenset[Shape]) -> str | list[Message]:
    if isinstance(content, str):
        return content if Shape.STRING in shapes else [{"type": "text", "text": content}]
    if Shape.PARTS in shapes:
        return [dict(part) for part in content]
    text = "\n".join(part["text"] for part in content)
    return text if Shape.STRING in shapes else [{"type": "text", "text": text}]
