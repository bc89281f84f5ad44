"""Which tokens an answer of a chat may go on with: calls in their form, an end of reasoning after so many tokens.

The parser that takes the answer apart for the caller also says here where it is, so what is constrained and what is
read as a call cannot differ. Outside of calls and of the end of a thought everything is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

import numpy as np
from llguidance import LLMatcher

from engine.constraints.side_by_side import SideBySide
from engine.errors import EngineError
from engine.sampling.constraint import Bits
from engine.text import IncrementalDecoder, Tokenizer
from engine.text.answers.formats import Kind
from engine.text.answers.rules import AnswerRules, CallRules

Make = Callable[[CallRules, bool, str | None], LLMatcher]
"""Rules, whether the opening marker is there already, the function that a header named → a fresh matcher."""


class AnswerMask(SideBySide):
    """The TokenMask of one answer.

    Args:
        rules: what the answer is held to.
        tokenizer: the model's.
        make: gives matchers.
        end_ids: tokens that end a text.
        n_rows: rows of the model's logits.
        n_tokens: tokens that the grammar library knows: n_rows, or one more.
    """

    def __init__(
        self,
        rules: AnswerRules,
        tokenizer: Tokenizer,
        make: Make,
        end_ids: Collection[int],
        n_rows: int,
        n_tokens: int,
    ) -> None:
        self._rules = rules
        self._tokenizer = tokenizer
        self._make = make
        self._buffer: Bits = np.zeros(-(-n_tokens // 32), np.uint32)
        self._n_words = -(-n_rows // 32)
        self._free: Bits = np.full(self._n_words, 0xFFFFFFFF, np.uint32)
        self._endless = self._free.copy()
        _clear(self._endless, [i for i in end_ids if i < n_rows])
        self._n_rows = n_rows
        self._begin()

    def _begin(self) -> None:
        """The state before the first token."""
        rules = self._rules
        self._n_consumed = 0
        self._is_moving = False
        self.ready = None
        self._parser = rules.parser()
        self._decoder = IncrementalDecoder(self._tokenizer, continuation=True, shown=rules.shown_ids)
        self._matcher: LLMatcher | None = None
        self._judged = 0  # sections of calls that have been looked at
        self._done = False
        self._n_thought = 0
        self._queue: list[int] = []  # tokens that end a thought
        self._banned: int | None = None  # what may not follow them
        calls = rules.calls
        self._waits = calls is not None and calls.forced  # for the place where the calls have to begin
        self._thought_ids: tuple[int, ...] = ()
        if calls is not None and self._waits and (calls.form.opens or self._parser.kind is not Kind.REASONING):
            self._start(calls, opened=False)
            begins = (marks.begin for marks in rules.markers.marks if marks.kind is Kind.REASONING)
            ids = (self._tokenizer.token_id(begin) for begin in begins)
            self._thought_ids = tuple(i for i in ids if i is not None and i < self._n_rows)
        self._watch_thought()

    def bits(self, output_ids: Sequence[int]) -> Bits:
        """See TokenMask.bits."""
        self._follow(output_ids)
        if self._queue:
            bits = self._buffer[: self._n_words]
            bits[:] = 0
            _set(bits, self._queue[:1])
            return bits
        if self._matcher is None:
            if self._banned is not None:
                bits = self._buffer[: self._n_words]
                bits[:] = self._endless
                _clear(bits, [self._banned])
                return bits
            return self._endless if self._waits else self._free
        computed, self.ready = self.ready, None
        if computed is None:
            computed = self._buffer
            self._matcher.unsafe_compute_mask_ptr(computed.ctypes.data, computed.nbytes)
        bits = computed[: self._n_words]
        if self._matcher.is_error() or not bits.any():
            raise self._error("no token may follow")
        if not self._n_consumed:
            _set(bits, self._thought_ids)
        return bits

    def matcher_behind(self, output_ids: Sequence[int]) -> tuple[LLMatcher, int] | None:
        """See SideBySide.matcher_behind."""
        self._follow(output_ids)
        return None if self._queue or self._matcher is None else (self._matcher, len(self._buffer))

    def forced(self, output_ids: Sequence[int]) -> Sequence[int]:
        """See TokenMask.forced."""
        self._follow(output_ids)
        if self._queue:
            return list(self._queue)
        if self._matcher is None or (self._thought_ids and not self._n_consumed):
            return ()
        return self._matcher.compute_ff_tokens()

    def is_complete(self, output_ids: Sequence[int]) -> bool:
        """See TokenMask.is_complete."""
        self._follow(output_ids)
        return self._done

    def _follow(self, output_ids: Sequence[int]) -> None:
        """Take the tokens that came since the last call; begin again where an exception cut that short."""
        if self._is_moving:
            self._begin()
        for token_id in output_ids[self._n_consumed :]:
            self._is_moving, self.ready = True, None
            self._take(token_id)
            self._n_consumed += 1
            self._is_moving = False

    def _take(self, token_id: int) -> None:
        first = self._n_consumed == 0
        if token_id < self._tokenizer.vocab_size:
            self._parser.push(self._decoder.push(token_id))
        if self._queue:
            self._queue.pop(0)
            self._banned = self._not_after_end() if not self._queue else None
        else:
            self._banned = None
        if self._matcher is not None and not (first and token_id in self._thought_ids):
            if not self._matcher.consume_token(token_id):
                raise self._error(f"token {token_id} was drawn against it")
            if self._matcher.is_stopped():
                self._section_ended()
        elif self._rules.calls is not None:
            self._matcher = None
            self._look(self._rules.calls)
        self._watch_thought()

    def _look(self, calls: CallRules) -> None:
        """Whether calls begin here."""
        parser = self._parser
        if self._waits:
            if parser.kind is not Kind.REASONING:
                self._start(calls, opened=False)
            return
        if parser.kind is not Kind.CALLS or parser.n_sections == self._judged:
            return
        if parser.is_bare:
            begun = _bare_beginning(calls, parser.open_calls)
            if begun is None:
                return  # more text is needed
            fits = begun and not calls.form.begin
        elif parser.recipient is not None:
            fits = parser.recipient in (name for name, _ in calls.tools)
        else:
            fits = parser.marker == calls.form.begin
        self._judged = parser.n_sections
        if fits:
            self._start(calls, opened=True, behind=parser.open_calls, recipient=parser.recipient)

    def _start(self, calls: CallRules, *, opened: bool, behind: str = "", recipient: str | None = None) -> None:
        """Calls are constrained from here on; `behind` is text of theirs that is there already."""
        matcher = self._make(calls, opened, recipient)
        ids = self._tokenizer.encode_rendered(behind) if behind else []
        if matcher.try_consume_tokens(ids) < len(ids):
            return  # a token that began before the marker's end went another way: it is read as what it is
        self._waits = False
        self._matcher = matcher
        if matcher.is_stopped():
            self._section_ended()

    def _section_ended(self) -> None:
        calls = self._rules.calls
        assert calls is not None, "only calls have sections"
        if calls.forced or not calls.several or not calls.form.end:
            self._done = True
        else:
            self._matcher = None
            self._judged = self._parser.n_sections

    def _watch_thought(self) -> None:
        """Count the tokens of reasoning, and end it where they are too many."""
        most = self._rules.max_reasoning
        if most is None or self._parser.kind is not Kind.REASONING or self._queue:
            return
        if self._n_thought >= most and self._matcher is None:
            self._queue = self._tokenizer.encode(self._rules.reasoning_end, add_special=False)
        self._n_thought += 1

    def _not_after_end(self) -> int | None:
        word = self._rules.not_after_end
        return self._tokenizer.encode(word, add_special=False)[0] if word else None

    def _error(self, what: str) -> EngineError:
        matcher = self._matcher
        assert matcher is not None, "only grammars fail"
        reason = matcher.get_error() or matcher.stop_reason()
        return EngineError(f"the tool call of this request cannot go on: {what} ({reason.splitlines()[0]})")


def _bare_beginning(calls: CallRules, text: str) -> bool | None:
    """Whether a text without a marker begins a call of one of the tools; None: it is too short to tell."""
    head, _, _ = (calls.form.around[0] + calls.form.call).partition("$name")
    words = r"\s*".join(re.escape(part) for part in re.findall(r"\w+|[^\w\s]", head))
    text = text.lstrip()
    found = re.match(words, text)
    if found is None:
        return None if len(text) < 3 * len(head) and "\n\n" not in text else False
    rest = text[found.end() :]
    for name, _ in calls.tools:
        if rest.startswith(name) and len(rest) > len(name):
            return not re.match(r"[\w.:/-]", rest[len(name)])
        if name.startswith(rest):
            return None
    return False


def _set(bits: Bits, ids: Sequence[int]) -> None:
    for i in ids:
        bits[i // 32] |= np.uint32(1 << (i % 32))


def _clear(bits: Bits, ids: Sequence[int]) -> None:
    for i in ids:
        bits[i // 32] &= np.uint32(0xFFFFFFFF ^ (1 << (i % 32)))
