"""A constraint together with a limit of the thoughts that come before its text."""

from __future__ import annotations

from collections.abc import Sequence

from engine.constraints.answer_mask import AnswerMask
from engine.constraints.matcher import GrammarMask
from engine.sampling.constraint import Bits, TokenMask


class LimitedMask:
    """The TokenMask of both. The constraint's grammar has the thought and its end marker in it.

    Args:
        constraint: of the text, with what may come before it.
        answer: ends the thought; without calls.
    """

    def __init__(self, constraint: GrammarMask, answer: AnswerMask) -> None:
        self._constraint = constraint
        self._answer = answer

    def bits(self, output_ids: Sequence[int]) -> Bits:
        """See TokenMask.bits."""
        bits = self._constraint.bits(output_ids)
        both = bits & self._answer.bits(output_ids)
        return both if both.any() else bits  # behind the end of a thought the constraint has the last word

    def prepare(self, wanted: Sequence[tuple[TokenMask, Sequence[int]]]) -> None:
        """See TokenMask.prepare."""
        self._constraint.prepare(wanted)

    def forced(self, output_ids: Sequence[int]) -> Sequence[int]:
        """See TokenMask.forced. In a thought there is a choice, but for its end, which is drawn token by token."""
        return self._constraint.forced(output_ids)

    def is_complete(self, output_ids: Sequence[int]) -> bool:
        """See TokenMask.is_complete."""
        return self._constraint.is_complete(output_ids)
