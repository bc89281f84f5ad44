"""What a request will make a model read, as far as routing needs it: hashes of its beginnings. Knows no Ray."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from engine.serve.models.model_store import ModelNames

PIECE = 256
"""Characters of a text, or token ids times CHARACTERS_PER_TOKEN, between two beginnings that are told apart."""
CHARACTERS_PER_TOKEN = 4
_FIRST_FIELDS = ("system", "instructions", "tools", "functions")
"""Fields that chat templates put in front of the messages."""


@dataclass(frozen=True)
class Conversation:
    """The beginnings of a request's prompt.

    Attributes:
        hashes: of the beginnings, shortest first; equal ones are beginnings with equal content, of the same model.
        sizes: their lengths in characters.
        model: the model that a replica must have open for it; empty where all have it, or no one knows.
    """

    hashes: tuple[bytes, ...] = ()
    sizes: tuple[int, ...] = ()
    model: str = ""

    @property
    def size(self) -> int:
        """Characters to read where nothing was read before."""
        return self.sizes[-1] if self.sizes else 0


def conversation_of(body: bytes, models: ModelNames) -> Conversation:
    """The conversation in a request's body; without beginnings where the body is none of those known.

    Args:
        body: JSON of any of the server's endpoints that generate.
        models: of the server.
    """
    try:
        value = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return Conversation()
    if not isinstance(value, dict):
        return Conversation()
    name = value.get("model")
    spec = models.find(name if isinstance(name, str) else None)
    model = "" if spec is None else spec.name
    hashes, sizes = [], []
    state, size = blake2b(model.encode(errors="replace"), digest_size=16), 0
    for piece in _pieces(value):
        state.update(piece)
        state.update(b"\0")
        size += len(piece)
        hashes.append(state.copy().digest())
        sizes.append(size)
    return Conversation(tuple(hashes), tuple(sizes), model if models.several else "")


def _pieces(value: dict[str, Any]) -> Iterable[bytes]:
    """The prompt in order: whole messages, and texts cut at fixed lengths."""
    messages = value.get("messages", value.get("input"))
    prompt = value.get("prompt")
    if isinstance(messages, list):
        for name in _FIRST_FIELDS:
            if value.get(name):
                yield _bytes(value[name])
        for message in messages:
            yield _bytes(message)
    elif isinstance(messages, str):
        yield from _bytes_pieces([value[name] for name in _FIRST_FIELDS if value.get(name)], messages)
    elif isinstance(prompt, str):
        yield from _bytes_pieces([], prompt)
    elif isinstance(prompt, list) and prompt:
        first = prompt[0]
        if isinstance(first, str):
            yield from _bytes_pieces([], first)
        else:
            ids, step = (first if isinstance(first, list) else prompt), PIECE // CHARACTERS_PER_TOKEN
            for begin in range(0, len(ids), step):
                yield " ".join(map(str, ids[begin : begin + step])).encode(errors="replace")


def _bytes_pieces(before: list[Any], text: str) -> Iterable[bytes]:
    for one in before:
        yield _bytes(one)
    for begin in range(0, len(text), PIECE):
        yield text[begin : begin + PIECE].encode(errors="replace")


def _bytes(value: Any) -> bytes:
    """The same for equal values, whatever the order of their fields."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
