"""The state of one constrained request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher

from engine.constraints.grammars import short_reason
from engine.constraints.side_by_side import SideBySide
from engine.errors import EngineError
from engine.sampling.constraint import Bits


class GrammarMask(SideBySide):
    """The TokenMask of one request: follows the tokens generated so far through a grammar.

    Args:
        matcher: in its first state; belongs to this request from now on.
        n_rows: rows of the model's logits.
        n_tokens: tokens that the library knows: n_rows, or one more.
    """

    def __init__(self, matcher: LLMatcher, n_rows: int, n_tokens: int) -> None:
        self._matcher = matcher
        self._n_consumed = 0
        self._is_moving = False
        self._bits: Bits = np.zeros(-(-n_tokens // 32), np.uint32)
        self._n_words = -(-n_rows // 32)

    def bits(self, output_ids: Sequence[int]) -> Bits:
        """See TokenMask.bits."""
        self._follow(output_ids)
        bits, self.ready = self.ready, None
        if bits is None:
            bits = self._bits
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        bits = bits[: self._n_words]
        if self._matcher.is_error() or not bits.any():
            raise self._error("no token may follow")
        return bits

    def matcher_behind(self, output_ids: Sequence[int]) -> tuple[LLMatcher, int] | None:
        """See SideBySide.matcher_behind."""
        self._follow(output_ids)
        return self._matcher, len(self._bits)

    def forced(self, output_ids: Sequence[int]) -> Sequence[int]:
        """See TokenMask.forced. What bytes must follow is cut as the tokenizer cuts it, with the last token before."""
        self._follow(output_ids)
        return self._matcher.compute_ff_tokens()

    def is_complete(self, output_ids: Sequence[int]) -> bool:
        """See TokenMask.is_complete."""
        self._follow(output_ids)
        return self._matcher.is_stopped()

    def _follow(self, output_ids: Sequence[int]) -> None:
        """Consume the tokens that came since the last call.

        An exception of another thread or a signal may arrive between the library's step and our count of it. Then the
        flag is still set, and the next call starts again from the first token.
        """
        if self._is_moving:
            self._matcher.reset()
            self._n_consumed, self.ready = 0, None
        for token_id in output_ids[self._n_consumed :]:
            self._is_moving, self.ready = True, None
            if not self._matcher.consume_token(token_id):
                raise self._error(f"token {token_id} was drawn against it")
            self._n_consumed += 1
            self._is_moving = False

    def _error(self, what: str) -> EngineError:
        reason = self._matcher.get_error() or self._matcher.stop_reason()
        return EngineError(f"the constraint of this request cannot go on: {what} ({short_reason(reason)})")
