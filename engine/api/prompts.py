"""What callers may give as a prompt: text, token ids of any integer type, or several of these. Knows no tokenizer."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequestError

Prompt = str | Sequence[int]


def as_prompts(prompt: Any) -> tuple[list[Any], bool]:
    """What was given as a list of prompts, and whether it was a single one. An empty list is a list of no prompts."""
    if isinstance(prompt, str):
        return [prompt], True
    if not is_prompt_like(prompt):
        raise not_a_prompt(prompt)
    items = list(prompt)
    if items and not hasattr(items[0], "__len__"):  # numbers
        return [items], True
    return items, False


def is_prompt_like(prompt: Any) -> bool:
    """Text or a row of things. Bytes are no token ids, although they look like numbers to Python."""
    return isinstance(prompt, Iterable) and not isinstance(prompt, (bytes, bytearray, Mapping))


def not_a_prompt(found: Any) -> InvalidRequestError:
    """The error for anything else."""
    return InvalidRequestError(f"a prompt is text or a list of whole token ids; found {reprlib.repr(found)}")


def check_id(token_id: Any, vocab_size: int) -> int:
    """A token id as a plain integer.

    Raises:
        InvalidRequestError: it is no integer, or outside the vocabulary.
    """
    try:
        value = token_id.__index__()
    except AttributeError:
        raise InvalidRequestError(f"a prompt is text or a list of whole token ids; found {token_id!r} in it") from None
    if not 0 <= value < vocab_size:
        raise InvalidRequestError(f"token id {value} is outside the vocabulary; allowed: 0 to {vocab_size - 1}")
    return int(value)
