"""Makes masks of descriptions, for one model. Grammars are kept by their text."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.concurrency import fork
from engine.constraints.answer_mask import AnswerMask
from engine.constraints.call_grammar import call_grammar
from engine.constraints.costs import check_cost, check_patterns
from engine.constraints.grammars import grammar_text, refused
from engine.constraints.limited import LimitedMask
from engine.constraints.matcher import GrammarMask
from engine.constraints.openings import with_opening
from engine.constraints.side_by_side import MOST_THREADS
from engine.constraints.vocabulary import build_trie
from engine.errors import InvalidRequestError
from engine.sampling.constraint import Constraint, Lark
from engine.sampling.opening import Opening
from engine.text import Tokenizer
from engine.text.answers.rules import AnswerRules, CallRules

LIMITS = LLParserLimits(max_grammar_size=50_000, verbose_errors=False)
"""Bound what a grammar costs: about 4 s of one core to compile, for some 4000 properties. The other limits are the
library's own: fuel for regular expressions, and items of one token's step."""

MAX_KEPT = 128
"""Compiled grammars that are kept; the one unused for longest goes first."""

AGAIN_SECONDS = 0.005
"""A grammar that takes no longer is compiled anew for each of its first MOST_THREADS requests: copies of one matcher
share a lexer, of which one thread at a time can make use. A schema of 20 fields takes 0.7 ms."""


@dataclass(eq=False)
class _Kept:
    """A compiled grammar: matchers with a lexer each, how long one took, and requests that it has served."""

    matchers: list[LLMatcher]
    seconds: float
    served: int = 0


class _Fresh(NamedTuple):
    """A matcher in its first state, the number of tokens that it knows, and which of its grammar's lexers it has."""

    matcher: LLMatcher
    n_tokens: int
    lexer: int


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
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = fork.new_lock()
        self._compiling = fork.new_lock()

    def prepare(self) -> None:
        """Make the trie of the vocabulary, if it is not there yet: 0.3 to 0.6 s for 128 thousand tokens.

        The library holds the interpreter lock meanwhile, so a thread beside running requests would stop these.
        """
        with self._lock:
            if self._trie is None:
                self._trie = build_trie(self._tokenizer, self._n_rows, self._end_ids)

    def mask(
        self,
        constraint: Constraint,
        opening: Opening | None = None,
        calls: CallRules | None = None,
        limit: AnswerRules | None = None,
    ) -> GrammarMask | LimitedMask:
        """The mask of a new request.

        Args:
            constraint: what its text has to be.
            opening: what may come before that text.
            calls: calls of tools that may come instead of the text.
            limit: how long the thoughts before it may be.

        Raises:
            ConstraintError: the constraint is damaged, contradicts itself, or uses what the library cannot do.
            InvalidRequestError: calls of this form cannot be told from constrained text, or arguments of a tool cannot
                be held to their schema.
        """
        check_cost(constraint)
        if calls is not None:
            self._check_beside_text(calls)
        found = self._matcher(constraint, opening, calls)
        mask, n_tokens = GrammarMask(found.matcher, self._n_rows, found.n_tokens), found.n_tokens
        mask.lexer = found.lexer
        if limit is None or opening is None:
            return mask
        thoughts = replace(limit, calls=None)
        return LimitedMask(
            mask, AnswerMask(thoughts, self._tokenizer, self._make, self._end_ids, self._n_rows, n_tokens)
        )

    def answer_mask(self, rules: AnswerRules) -> AnswerMask:
        """The mask of an answer with calls, or with a limit of its reasoning.

        Raises:
            InvalidRequestError: arguments of a tool cannot be held to their schema.
        """
        n_tokens = self._n_rows if rules.calls is None else self._check_calls(rules.calls)
        return AnswerMask(rules, self._tokenizer, self._make, self._end_ids, self._n_rows, n_tokens)

    def _check_calls(self, calls: CallRules) -> int:
        """Calls that cannot be constrained are refused now or never. Returns the tokens that matchers know."""
        check_patterns(schema for _, schema in calls.tools)
        try:
            n_tokens = self._matcher(self._calls(calls, opened=False)).n_tokens
            self._matcher(self._calls(calls, opened=True))
        except InvalidRequestError as error:
            raise self._tool_refused(calls, error) from None
        return n_tokens

    def _check_beside_text(self, calls: CallRules) -> None:
        if not calls.form.begin or calls.form.opens:
            raise InvalidRequestError(
                f"calls of the form {calls.form.name} have no marker of their own before them, so they cannot be told "
                "from a constrained text; leave out the constraint or the tools, or say tool_choice "
                '"none" or "required"'
            )
        self._check_calls(calls)

    def _make(self, calls: CallRules, opened: bool, recipient: str | None) -> LLMatcher:
        return self._matcher(self._calls(calls, opened=opened, recipient=recipient)).matcher

    def _calls(self, calls: CallRules, *, opened: bool, recipient: str | None = None) -> Lark:
        split = self._tokenizer.control_pieces
        return Lark(call_grammar(calls, split, opened=opened, recipient=recipient))

    def _tool_refused(self, calls: CallRules, error: InvalidRequestError) -> InvalidRequestError:
        """The error with the name of the tool whose schema is to blame."""
        for name, schema in calls.tools:
            try:
                self._matcher(self._calls(replace(calls, tools=((name, schema),)), opened=True))
            except InvalidRequestError as inner:
                reason = str(inner).rpartition("failed to compile JSON schema:")[2].strip().splitlines()[0]
                return InvalidRequestError(
                    f"the arguments of the tool {name!r} cannot be held to their schema: {reason}; "
                    'change the schema, or give the function "strict": false'
                )
        return error

    def _matcher(
        self, constraint: Constraint, opening: Opening | None = None, calls: CallRules | None = None
    ) -> _Fresh:
        text = grammar_text(constraint)
        if opening is not None or calls is not None:
            written = None if calls is None else self._calls(calls, opened=False).grammar
            text = with_opening(text, opening or Opening(), self._tokenizer, written)
        self.prepare()
        trie = self._trie
        assert trie is not None, "prepared above"
        with self._lock:
            kept = self._kept.get(text)
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
            first.served += 1
            again = first.seconds <= AGAIN_SECONDS and len(first.matchers) < min(first.served, MOST_THREADS)
        more = [LLMatcher(trie, text, log_level=0, limits=LIMITS)] if again else []
        with self._lock:
            first.matchers += more
            lexer = first.served % len(first.matchers)
            return _Fresh(first.matchers[lexer].deep_copy(), trie.vocab_size, lexer)

    @staticmethod
    def _compiled(constraint: Constraint, text: str, trie: LLTokenizer) -> _Kept:
        begin = time.perf_counter()
        matcher = LLMatcher(trie, text, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise refused(constraint, matcher.get_error())
        return _Kept([matcher], time.perf_counter() - begin)
