"""Markers in text that arrives in pieces, and the white space around them."""

import json
from collections.abc import Collection


class Flow:
    """Text of one kind: no white space at the beginning of a stretch that follows structure, none before structure.

    Attributes:
        started: whether some text has been returned.
    """

    def __init__(self) -> None:
        self._waiting = ""
        self.started = False
        self._trim = False

    def push(self, text: str) -> str:
        """Take text; returns what can be shown now."""
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        kept = text.rstrip()
        if not kept:
            self._waiting += text
            return ""
        shown = self._waiting + kept
        self._waiting = text[len(kept) :]
        self.started = True
        return shown

    @property
    def state(self) -> tuple[str, bool]:
        """What a cut changes; given back where it turns out that there was no structure."""
        return self._waiting, self._trim

    @state.setter
    def state(self, state: tuple[str, bool]) -> None:
        self._waiting, self._trim = state

    def cut(self) -> None:
        """Called at a marker: what follows is another stretch, separated by an empty line from the one before."""
        self._waiting = "\n\n" if self.started else ""
        self._trim = True

    def finish(self) -> str:
        """Called at the end: the white space that was held back."""
        shown, self._waiting = (self._waiting if not self._trim else ""), ""
        return shown


def first_marker(text: str, markers: Collection[str]) -> tuple[int, str | None]:
    """The first marker in a text, the longest of those that begin together; (-1, None) where there is none."""
    found: tuple[int, int, str | None] = (-1, 0, None)
    for marker in markers:
        start = text.find(marker)
        if start >= 0 and (found[2] is None or (start, -len(marker)) < found[:2]):
            found = (start, -len(marker), marker)
    return found[0], found[2]


def longer_possible(text: str, marker: str, markers: Collection[str]) -> bool:
    """Whether a longer marker may begin where this one does."""
    return any(len(text) < len(other) and other != marker and other.startswith(text) for other in markers)


def possible_beginning(text: str, markers: Collection[str]) -> int:
    """Length of the longest tail of a text that may be the beginning of a marker."""
    longest = 0
    for marker in markers:
        for length in range(min(len(text), len(marker) - 1), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest


def inside(text: str) -> str:
    """Text as it is inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
