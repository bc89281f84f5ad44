"""Work that grows with a request, kept away from the event loop: in a thread, and there in pieces.

A thread alone is not enough: one call into C, such as that of the JSON encoder, holds the interpreter lock to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from starlette.responses import Response

from engine.serve.errors import dump

T = TypeVar("T")

SHORT = 2048
"""Tokens or messages about which work takes less time than the way to a thread and back, or not much more."""

PIECE = 1 << 14
"""Numbers, texts, lists and objects that are encoded at once: some milliseconds."""


async def off_loop(n: int, work: Callable[[], T]) -> T:
    """What work() gives: called at once where it is about few tokens or messages, else in a thread."""
    return work() if n <= SHORT else await asyncio.to_thread(work)


def written(value: Any) -> Response:
    """An answer of JSON text, as json_response() makes it, written piece by piece; to be called in a thread."""
    return Response(b"".join(_pieces(value)), media_type="application/json")


def _pieces(value: Any) -> Iterator[bytes]:
    """JSON text in pieces of about PIECE values."""
    if _weight(value) <= PIECE:
        yield dump(value)
    elif isinstance(value, dict):
        for number, (key, one) in enumerate(value.items()):
            yield (b"," if number else b"{") + dump(key) + b":"
            yield from _pieces(one)
        yield b"}"
    else:
        step = PIECE // _weight(value[len(value) // 2])
        for begin in range(0, len(value), max(step, 1)):
            yield b"," if begin else b"["
            if step:
                yield dump(value[begin : begin + step])[1:-1]
            else:
                yield from _pieces(value[begin])
        yield b"]"


def _weight(value: Any) -> int:
    """About how many values there are in one, itself included; entries of a list are taken to be like the middle one.

    The first one often differs: there is no log-probability of a text's first token.
    """
    if isinstance(value, dict):
        return 1 + sum(map(_weight, value.values()))
    if isinstance(value, (list, tuple)) and value:
        return 1 + len(value) * _weight(value[len(value) // 2])
    return 1
