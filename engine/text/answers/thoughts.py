"""What becomes of a model's thoughts: where they go in its answer, and how many tokens an effort allows them.

The names of the formats are those of llama.cpp's server.
"""

from enum import Enum
from typing import Any

from engine.errors import InvalidRequestError


class ReasoningFormat(Enum):
    """Where thoughts go."""

    AUTO = "auto"  # as DEEPSEEK
    DEEPSEEK = "deepseek"  # apart from the text
    NONE = "none"  # into the text, as the model writes them
    LEGACY = "deepseek-legacy"  # both apart and into the text

    @classmethod
    def parse(cls, given: Any) -> "ReasoningFormat":
        """The member of a name.

        Raises:
            InvalidRequestError: there is none.
        """
        if isinstance(given, cls):
            return given
        for member in cls:
            if member.value == given:
                return member
        allowed = ", ".join(member.value for member in cls)
        raise InvalidRequestError(f"reasoning_format is {given!r}; allowed: {allowed}")

    @property
    def in_text(self) -> bool:
        """Whether thoughts appear in the text."""
        return self in (ReasoningFormat.NONE, ReasoningFormat.LEGACY)

    @property
    def apart(self) -> bool:
        """Whether thoughts appear apart from the text."""
        return self is not ReasoningFormat.NONE


BUDGETS = {"none": 0, "minimal": 256, "low": 1024, "medium": 4096, "high": 16384, "xhigh": None, "max": None}
"""Tokens of reasoning by effort, for models whose chat template does not read the effort itself; None: any number."""


def budget_of(given: Any, effort: Any, *, read_by_template: bool) -> int | None:
    """Tokens of reasoning at most; None: any number.

    Args:
        given: what the caller says of them; it goes before the effort.
        effort: how much the model is to think, of which unknown words are the template's business.
        read_by_template: whether the chat template makes something of the effort.

    Raises:
        InvalidRequestError: `given` is no whole number of at least 0.
    """
    if given is None:
        return None if read_by_template or not isinstance(effort, str) else BUDGETS.get(effort)
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise InvalidRequestError(f"max_reasoning_tokens is {given!r}; allowed: None or a whole number of at least 0")
    return given
