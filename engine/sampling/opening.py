"""What an answer may have before the text that a constraint is about: what the model thinks, and markers of structure.

Knows markers as text only; which of them a model uses is told by its chat template.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thought:
    """A stretch of free text before the answer.

    Attributes:
        begin: the marker that begins it.
        ends: markers of which one ends it.
    """

    begin: str
    ends: tuple[str, ...]


@dataclass(frozen=True)
class Opening:
    """The beginning of an answer.

    Attributes:
        opened: where the prompt has begun a thought, the markers of which one ends it.
        thoughts: those that the model may begin itself.
        heads: markers of which one may come directly before the answer.
        in_messages: whether an answer is several messages: any number of thoughts, then one of the heads.
    """

    opened: tuple[str, ...] = ()
    thoughts: tuple[Thought, ...] = ()
    heads: tuple[str, ...] = ()
    in_messages: bool = False
