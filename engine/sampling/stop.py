"""Stop strings in streamed text: no part of a stop string is ever shown, however the text is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Looks for stop strings in text that arrives in pieces.

    The match that ends first is taken; of those that end together, the longest. So the result does not depend on where
    the pieces are cut. After a match all further text is dropped.

    Args:
        stops: the stop strings, none of them empty; without any, all text passes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string must be refused before"
        self._stops = tuple(stops)
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string found, None so far."""
        return self._matched

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._matched is not None

    def push(self, piece: str) -> str:
        """Take a piece; returns the text that can be shown now.

        A tail that may be the beginning of a stop string is held back.
        """
        if self._matched is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        found: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
                found = (start + len(stop), start, stop)
        if found is not None:
            self._matched = found[2]
            self._held = ""
            return text[: found[1]]
        cut = len(text) - self._possible_beginning(text)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """End of the text: what was held back and is no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest tail of text that begins, but does not complete, a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(text), len(stop) - 1), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
