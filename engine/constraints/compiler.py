"""Makes masks of descriptions, for one model. Grammars are kept by their text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.concurrency import fork
from engine.constraints.grammars import grammar_text, refused
from engine.constraints.matcher import GrammarMask
from engine.constraints.openings import with_opening
from engine.constraints.vocabulary import build_trie
from engine.sampling.constraint import Constraint
from engine.sampling.opening import Opening
from engine.text import Tokenizer

LIMITS = LLParserLimits(max_grammar_size=50_000, verbose_errors=False)
"""Bound what a grammar costs: about 4 s of one core to compile, for some 4000 properties. The other limits are the
library's own: fuel for regular expressions, and items of one token's step."""

MAX_KEPT = 128
"""Compiled grammars that are kept; the one unused for longest goes first."""


class ConstraintCompiler:
    """Compiles constraints for one vocabulary.

    Args:
        tokenizer: the model's.
        n_rows: rows of the model's logits.
        end_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, n_rows: int, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._n_rows = n_rows
        self._end_ids = end_ids
        self._trie: LLTokenizer | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = fork.new_lock()
        self._compiling = fork.new_lock()

    def mask(self, constraint: Constraint, opening: Opening | None = None) -> GrammarMask:
        """The mask of a new request.

        Args:
            constraint: what its text has to be.
            opening: what may come before that text.

        Raises:
            ConstraintError: the constraint is damaged, contradicts itself, or uses what the library cannot do.
        """
        text = grammar_text(constraint)
        if opening is not None:
            text = with_opening(text, opening, self._tokenizer)
        with self._lock:
            if self._trie is None:
                self._trie = build_trie(self._tokenizer, self._n_rows, self._end_ids)
            trie, kept = self._trie, self._kept.get(text)
        if kept is None:
            with self._compiling:  # one at a time: a large grammar takes a core for seconds
                with self._lock:
                    kept = self._kept.get(text)
                kept = self._compiled(constraint, text, trie) if kept is None else kept
        with self._lock:
            first = self._kept.setdefault(text, kept)
            self._kept.move_to_end(text)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return GrammarMask(first.deep_copy(), self._n_rows, trie.vocab_size)

    @staticmethod
    def _compiled(constraint: Constraint, text: str, trie: LLTokenizer) -> LLMatcher:
        matcher = LLMatcher(trie, text, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise refused(constraint, matcher.get_error())
        return matcher
