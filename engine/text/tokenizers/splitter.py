"""Cuts special tokens out of text before anything else looks at it.

The order is llama.cpp's: the longest token (in UTF-8 bytes) takes its places first, from left to right, then the next
longest takes what is still free. A token may also swallow the ASCII white space next to it. Tokens are strings
here.
"""

import re
from collections.abc import Iterable, Iterator, Set

_PREFIX = 4  # characters of a token that the first, quick search looks for
_SPACE = " \t\n\v\f\r"


class SpecialSplitter:
    """Cuts text at a fixed set of token strings.

    Args:
        tokens: (string, id) pairs; empty strings are left out.
        swallow_right: ids that swallow the white space after them.
    """

    def __init__(self, tokens: Iterable[tuple[str, int]], swallow_right: Set[int] = frozenset()) -> None:
        self._ids = {text: id for text, id in tokens if text}
        self._swallow_right = swallow_right
        self._lengths = sorted({len(text) for text in self._ids})
        prefixes = sorted({text[:_PREFIX] for text in self._ids})
        # A look-ahead finds overlapping starts too; without tokens the pattern never matches.
        self._starts = re.compile(f"(?={'|'.join(map(re.escape, prefixes))})" if prefixes else r"(?!)")

    def split(self, text: str) -> Iterator[str | int]:
        """Yields pieces of text (never empty) and ids of special tokens, in order."""
        places = self._places(text)
        if not places:
            if text:
                yield text
            return
        position = 0
        for start, end, id in sorted(places):
            if start > position:
                yield text[position:start]
            yield id
            position = end
        if position < len(text):
            yield text[position:]

    def _places(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of every special token, not overlapping; `end` includes swallowed white space."""
        found: dict[str, list[int]] = {}
        for match in self._starts.finditer(text):
            start = match.start()
            for length in self._lengths:
                candidate = text[start : start + length]
                if len(candidate) == length and candidate in self._ids:
                    found.setdefault(candidate, []).append(start)
        taken = bytearray(len(text)) if found else bytearray()
        places: list[tuple[int, int, int]] = []
        for token in sorted(found, key=lambda token: (-len(token.encode()), self._ids[token])):
            id = self._ids[token]
            for start in found[token]:
                end = start + len(token)
                if taken.find(1, start, end) >= 0:
                    continue
                if id in self._swallow_right:
                    while end < len(text) and text[end] in _SPACE and not taken[end]:
                        end += 1
                taken[start:end] = b"\x01" * (end - start)
                places.append((start, end, id))
        return places
