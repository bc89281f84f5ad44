"""Headers of messages, in families whose answers are several of these: what they look like, what they say."""

import re

from engine.text.answers.formats import Channels, Kind

_LONGEST_HEADER = 200  # characters
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_HEADER_WORDS = re.compile(r"<\|channel\|>\w*|<\|constrain\|>\w*|\bassistant\Z|\bto=\S*|\s")
_PEOPLE = ("user", "assistant", "all")


def may_be_header(channels: Channels, body: str, raw: str) -> bool:
    """Whether a text may be, or become, a header.

    Args:
        channels: the form of messages.
        body: the text behind the marker that opened it.
        raw: the same with its markers.
    """
    body = body.lstrip()
    if len(body) > _LONGEST_HEADER or "\n" in body:
        return False
    if channels.opens == (">>>",) or not body or channels.header.match(body):
        return True
    return (
        any(word.startswith(body) for word in ("assistant", "to=", *channels.opens))
        or " to=" in body
        or (" " not in body and raw.startswith(channels.opens))
    )


def has_words(body: str) -> bool:
    """Whether a header that the answer ended in is text: it has words that no header has."""
    return bool(_HEADER_WORDS.sub("", body))


def meaning_of(channels: Channels, marker: str, header: str) -> tuple[Kind, str | None]:
    """What follows a header, and the function that it calls."""
    kind = dict(channels.bodies)[marker]
    if kind is not None:
        return kind, None
    if channels.opens == (">>>",):
        return (Kind.CONTENT, None) if header == "all" else (Kind.CALLS, header)
    channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
    if recipient is not None and recipient[1] == "self":
        return Kind.REASONING, None
    if recipient is not None and recipient[1] not in _PEOPLE:
        return Kind.CALLS, recipient[1].removeprefix("functions.")
    if channel is not None and channel[1] == "analysis":
        return Kind.REASONING, None
    return Kind.CONTENT, None
