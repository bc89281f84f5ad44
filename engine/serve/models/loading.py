"""How far a model's loading has come, told by the sentences that the engine says about it."""

from __future__ import annotations

import re

_STAGES = (
    ("uploading", 0.1, 0.7),
    ("building", 0.7, 0.95),
    ("preparing", 0.3, 0.6),
    ("repacking", 0.6, 0.95),
    ("downloading", 0.0, 0.1),
)
"""First words of the sentences, and the parts of the whole that they stand for."""
_COUNT = re.compile(r"(\d+)/(\d+)")
_PERCENT = re.compile(r"(\d+) ?%")


class LoadProgress:
    """The fraction that is done, which never falls.

    Attributes:
        fraction: 0 to 1.
        text: what is being done.
    """

    def __init__(self) -> None:
        self.fraction = 0.0
        self.text = "opening the file"

    def tell(self, text: str) -> None:
        """Take the next sentence; LLM calls it while it loads."""
        self.text = text
        for word, low, high in _STAGES:
            if text.startswith(word):
                self.fraction = max(self.fraction, low + (high - low) * _part(text))

    def done(self) -> None:
        """The model is open."""
        self.fraction, self.text = 1.0, "ready"


def _part(text: str) -> float:
    count, percent = _COUNT.search(text), _PERCENT.search(text)
    if count is not None and int(count[2]):
        return min(int(count[1]) / int(count[2]), 1.0)
    return min(int(percent[1]) / 100, 1.0) if percent is not None else 0.0
