"""Takes an answer apart while it is generated: content, reasoning, calls.

Text that was returned is never revoked: text that may be the beginning of a marker is held back, and so is white space
that a marker may follow. Markers are data: the records of formats.py.
"""

import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from engine.request import CallPart, ToolCall
from engine.text.answers.call_stream import Section, Sections
from engine.text.answers.formats import AnswerFormat, Channels, Kind, Marks
from engine.text.answers.headers import has_words, may_be_header, meaning_of
from engine.text.answers.marker_search import Flow, first_marker, longer_possible, possible_beginning
from engine.text.answers.thoughts import ReasoningFormat
from engine.text.answers.tool_calls import Types, call_id, new_call, read_calls

_QUOTE = re.compile(r'\\.|(")', re.DOTALL)
_BEFORE_JSON = ("[ARGS]", "<｜tool▁sep｜>", "<|tool_call_argument_begin|>", "<|tool_call:args|>")


@dataclass
class Piece:
    """What one push has brought.

    Attributes:
        content: new text of the answer.
        reasoning: new text of what comes before it.
        tool_calls: calls whose section has ended.
        call_parts: the same calls as they are written.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    call_parts: list[CallPart] = field(default_factory=list)


class AnswerParser:
    """Parser of one answer.

    Args:
        markers: the format in use.
        prompt: the end of the prompt, which may have opened a stretch already.
        types: types of the parameters of functions.
        sections: reads calls as they are written, where their form is known; else they are read when they are whole.
        thoughts: where reasoning goes.
        verbatim: once the answer's own text has begun, all that follows is its text, markers included.
        key: the same one gives calls the same ids again; None: one of its own.

    Attributes:
        n_sections: stretches of calls that have begun.
    """

    def __init__(
        self,
        markers: AnswerFormat,
        prompt: str = "",
        types: Types | None = None,
        *,
        sections: Sections | None = None,
        thoughts: ReasoningFormat = ReasoningFormat.AUTO,
        verbatim: bool = False,
        key: str | None = None,
    ) -> None:
        self._format = markers
        self._key = key or secrets.token_hex(8)
        self._thoughts = thoughts
        self._opened = ""  # a marker of the prompt that belongs into the text
        self._answering = False  # text of the answer, thoughts not counted, has begun
        self._verbatim = verbatim
        self._in_text = False  # verbatim text has begun
        self._types = types or {}
        self._sections = sections
        self._section: Section | None = None  # of the open stretch of calls
        self._before = ("", False)  # the state of the text's flow before it
        self._n_calls = 0
        self._flows = {Kind.CONTENT: Flow(), Kind.REASONING: Flow()}
        self._kind = Kind.CONTENT
        self._marks: Marks | None = None  # of the open stretch; None in a message of a channel
        self._opener: str | None = None  # the marker that ended the header of such a message
        self._text = ""  # not looked at yet
        self._body = ""  # of a header or of calls
        self._raw = ""  # the same with its markers
        self._recipient: str | None = None
        self._bare = False  # calls without a marker
        self._written: list[str] = []
        self.n_sections = 0
        self._open_by(prompt)

    @property
    def kind(self) -> Kind:
        """What the text that comes next belongs to, as far as that is known."""
        return self._kind

    @property
    def marker(self) -> str | None:
        """The marker that opened the stretch; None where none did."""
        return self._marks.begin if self._marks is not None else self._opener

    @property
    def open_calls(self) -> str:
        """The text of calls that are not closed, behind the marker that opened them."""
        keep = self._marks.keep if self._marks is not None else ""
        return self._body[len(keep) :] + self._text if self._kind is Kind.CALLS else ""

    @property
    def recipient(self) -> str | None:
        """The function that the header of the open message names."""
        return self._recipient if self._kind is Kind.CALLS else None

    @property
    def is_bare(self) -> bool:
        """Whether the open calls have no marker."""
        return self._bare and self._kind is Kind.CALLS

    @property
    def text_with_calls(self) -> str:
        """The content so far, with the calls as they were written."""
        return "".join(self._written)

    def push(self, text: str) -> Piece:
        """The next text of the answer, control tokens of structure included; returns what is certain now."""
        self._text += text
        piece = Piece()
        if text and self._opened:
            self._think(piece, self._opened)
            self._opened = ""
        while self._step(piece, final=False):
            pass
        return piece

    def finish(self) -> Piece:
        """Called at the end of the answer: all that was held back."""
        piece = Piece()
        while self._step(piece, final=True):
            pass
        if self._kind is Kind.CALLS:
            self._end_calls(piece, closed=False)
        elif self._kind is Kind.HEADER:
            self._say(piece, Kind.CONTENT, self._raw if has_words(self._body) else "")
        for kind, flow in self._flows.items():
            self._add(piece, kind, flow.finish())
        return piece

    # The steps --------------------------------------------------------------------------------------------------

    def _step(self, piece: Piece, *, final: bool) -> bool:
        """Look for the next marker; whether there may be another."""
        actions = self._actions()
        if self._format.bare_calls and self._kind is Kind.CONTENT and not self._answering:
            head = self._text.lstrip()
            if not head and not final:
                return False
            if head[:1] in ("{", "[") and not any(one.startswith(head) or head.startswith(one) for one in actions):
                self._bare = True
                self._enter(Kind.CALLS, None, "")
                return True
        if self._verbatim and self._begins_text(actions, final=final):
            self._say(piece, Kind.CONTENT, self._text)
            self._text = ""
            return False
        start, marker = first_marker(self._text, actions)
        if marker is None:
            cut = len(self._text) if final else len(self._text) - possible_beginning(self._text, actions)
            self._take(piece, self._text[:cut])
            self._text = self._text[cut:]
            if self._kind is Kind.HEADER and not may_be_header(self._channels, self._body, self._raw):
                self._not_a_header(piece)
                return True
            return False
        if not final and longer_possible(self._text[start:], marker, actions):
            self._take(piece, self._text[:start])
            self._text = self._text[start:]
            return False
        self._take(piece, self._text[:start])
        self._text = self._text[start + len(marker) :]
        actions[marker](piece, marker)
        return True

    def _begins_text(self, actions: Collection[str], *, final: bool) -> bool:
        """Whether what waits is the answer's own text: it cannot become a marker any more."""
        if self._kind is Kind.CONTENT and not self._in_text:
            head = self._text.lstrip()
            self._in_text = bool(head) and not any(
                head.startswith(marker) or (marker.startswith(head) and not final) for marker in actions
            )
        return self._in_text

    def _actions(self) -> dict[str, Callable[[Piece, str], None]]:
        """The markers that are valid at this place, and what they do."""
        channels = self._format.channels
        if self._kind is Kind.HEADER:
            assert channels is not None, "only channels have headers"
            bodies = dict.fromkeys((marker for marker, _ in channels.bodies), self._end_header)
            return {**bodies, **dict.fromkeys(channels.opens, self._open_header)}
        actions: dict[str, Callable[[Piece, str], None]] = {}
        if self._kind is Kind.CONTENT:
            actions |= dict.fromkeys(self._format.frames, self._skip)
            actions |= {marks.begin: self._begin for marks in self._format.marks}
            if not self._answering:
                ends = (end for marks in self._format.marks if marks.kind is Kind.REASONING for end in marks.ends)
                actions |= {end: self._stray_end for end in ends if end not in actions}
        elif self._marks is not None:
            actions |= dict.fromkeys(self._marks.ends, self._end)
            if self._kind is Kind.CALLS and not self._marks.keep:
                actions.setdefault(self._marks.begin, self._again)
            if self._kind is Kind.REASONING:  # special tokens of a call end reasoning that has no end marker
                actions |= {
                    one.begin: self._begin
                    for one in self._format.marks
                    if one.kind is Kind.CALLS and one.begin.startswith(("<|", "<｜")) and one.begin not in actions
                }
            return actions
        elif self._bare:
            actions |= dict.fromkeys(self._format.frames, self._end)
        if channels is not None:
            actions |= dict.fromkeys(channels.opens, self._open_header)
            actions |= dict.fromkeys(channels.ends, self._end)
        return actions

    def _take(self, piece: Piece, text: str) -> None:
        if self._kind in (Kind.CALLS, Kind.HEADER):
            self._body += text
            self._raw += text
            if self._section is not None:
                piece.call_parts += self._section.push(text)
        else:
            self._say(piece, self._kind, text)

    def _say(self, piece: Piece, kind: Kind, text: str) -> None:
        if kind is Kind.REASONING:
            self._think(piece, text)
            if not self._thoughts.apart:
                return
        elif text.strip():
            self._answering = True
        if text:
            self._add(piece, kind, self._flows[kind].push(text))

    def _think(self, piece: Piece, text: str) -> None:
        """Thoughts and their markers, where these belong into the text."""
        if text and self._thoughts.in_text:
            self._add(piece, Kind.CONTENT, self._flows[Kind.CONTENT].push(text))

    def _add(self, piece: Piece, kind: Kind, text: str) -> None:
        if kind is Kind.REASONING:
            piece.reasoning += text
        else:
            piece.content += text
            self._written.append(text)

    def _enter(
        self, kind: Kind, marks: Marks | None, raw: str, recipient: str | None = None, opener: str | None = None
    ) -> None:
        self._before = self._flows[Kind.CONTENT].state
        for flow_kind, flow in self._flows.items():
            if flow_kind is Kind.REASONING or not (self._thoughts.in_text and Kind.REASONING in (kind, self._kind)):
                flow.cut()
        self._kind, self._marks, self._opener = kind, marks, opener
        self.n_sections += kind is Kind.CALLS
        self._body = marks.keep if marks is not None else ""
        self._raw = raw
        self._section = None
        if kind is Kind.CALLS and self._sections is not None:
            self._section = self._sections.begin(self.marker, recipient, self._n_calls, self._key)

    def _begin(self, piece: Piece, marker: str) -> None:
        marks = next(one for one in self._format.marks if one.begin == marker)
        self._enter(marks.kind, marks, marker)
        if marks.kind is Kind.REASONING:
            self._think(piece, marker)

    def _skip(self, piece: Piece, marker: str) -> None:
        self._enter(Kind.CONTENT, None, "")

    def _stray_end(self, piece: Piece, marker: str) -> None:
        """An end marker without reasoning before it; after text it is text."""
        if self._answering:
            self._say(piece, Kind.CONTENT, marker)
        else:
            self._skip(piece, marker)

    def _in_string(self) -> bool:
        """Whether the open calls are inside a string, where a marker is text."""
        if self._section is not None and self._section.begun:
            return self._section.in_value
        body = self._body
        if self._recipient is None and not body.lstrip().startswith(("{", "[{", "[\n")):
            starts = [body.rfind(mark) + len(mark) for mark in _BEFORE_JSON if mark in body]
            if not starts:
                return False
            body = body[max(starts) :]
        return body.lstrip().startswith(("{", "[")) and sum(map(bool, _QUOTE.findall(body))) % 2 == 1

    def _again(self, piece: Piece, marker: str) -> None:
        if self._in_string():
            self._take(piece, marker)
            return
        marks = self._marks
        self._end_calls(piece)
        self._enter(Kind.CALLS, marks, marker)

    def _end(self, piece: Piece, marker: str) -> None:
        if self._kind is Kind.CALLS:
            if self._in_string():
                self._take(piece, marker)
                return
            self._raw += marker
            if self._marks is not None and self._marks.keep and marker in self._marks.ends:
                self._body += marker
            self._end_calls(piece)
            return
        if self._kind is Kind.REASONING:
            self._think(piece, marker)
        self._enter(Kind.CONTENT, None, "")

    def _end_calls(self, piece: Piece, *, closed: bool = True) -> None:
        raw, body, recipient, bare = self._raw, self._body, self._recipient, self._bare
        section, self._section = self._section, None
        self._recipient, self._bare = None, False
        if section is not None and section.begun:
            piece.call_parts += section.finish(closed=closed)
            calls = section.calls
        elif recipient is not None and not body.lstrip().startswith("<"):
            calls = (new_call(recipient, body),)
        else:
            calls = read_calls(body, self._types, closed=closed)
        if bare and not {call.name for call in calls} <= self._format.bare_calls:
            calls = ()
        if not calls and body.strip():  # not readable as calls: it stays in the answer unchanged
            self._kind, self._marks = Kind.CONTENT, None
            self._flows[Kind.CONTENT].state = self._before
            self._say(piece, Kind.CONTENT, raw)
            return
        self._enter(Kind.CONTENT, None, "")
        if calls:
            calls = tuple(
                call if call.id else replace(call, id=call_id(self._key, self._n_calls + number))
                for number, call in enumerate(calls)
            )
            self._written += ["\n", raw] if self._written and not self._written[-1].endswith("\n") else [raw]
            piece.tool_calls += calls
            if section is None or not section.begun:
                piece.call_parts += [
                    CallPart(self._n_calls + number, call.arguments, call.id, call.name)
                    for number, call in enumerate(calls)
                ]
            self._n_calls += len(calls)

    # Headers ----------------------------------------------------------------------------------------------------

    def _open_header(self, piece: Piece, marker: str) -> None:
        if self._kind is Kind.HEADER:  # a channel inside a header
            self._body += marker
            self._raw += marker
            return
        if self._kind is Kind.CALLS:
            if self._in_string():
                self._take(piece, marker)
                return
            self._end_calls(piece)
        self._enter(Kind.HEADER, None, marker)
        self._body = marker if marker == "<|channel|>" else ""

    def _end_header(self, piece: Piece, marker: str) -> None:
        channels = self._channels
        if not channels.header.match(self._body):
            self._body += marker
            self._raw += marker
            self._not_a_header(piece)
            return
        kind, recipient = meaning_of(channels, marker, self._body)
        raw = self._raw + marker
        self._enter(kind, None, raw if kind is Kind.CALLS else "", recipient, marker)
        self._recipient = recipient
        if kind is Kind.REASONING:
            self._think(piece, raw)

    def _not_a_header(self, piece: Piece) -> None:
        raw = self._raw
        self._kind, self._marks, self._raw, self._body = Kind.CONTENT, None, "", ""
        self._say(piece, Kind.CONTENT, raw)

    @property
    def _channels(self) -> Channels:
        assert self._format.channels is not None, "only channels have headers"
        return self._format.channels

    def _open_by(self, prompt: str) -> None:
        """What the end of the prompt has opened."""
        tail = prompt[-2000:].rstrip()
        channels = self._format.channels
        if channels is not None:
            _, opener, rest = tail.rpartition(channels.opens[0])
            if opener and not any(end in rest for end in channels.ends):
                self._kind, self._text = Kind.HEADER, rest
                while self._step(Piece(), final=True):
                    pass
                self._body = self._raw = ""
            return
        for marks in self._format.marks:
            if marks.kind is Kind.REASONING and tail.endswith(marks.begin):
                self._enter(Kind.REASONING, marks, "")
                if self._thoughts is ReasoningFormat.LEGACY:
                    self._opened = marks.begin
                return
