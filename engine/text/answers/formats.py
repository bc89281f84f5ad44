"""How models mark reasoning, calls and channels in their answers: one record for each family of markers.

The source of a model's chat template, and what the template writes for probes, decide which of them the model uses.
This module reads templates as text only.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from engine.text.probes import CALL_NAME, CALL_VALUE, THOUGHT


class Kind(Enum):
    """What a stretch of an answer is."""

    CONTENT = auto()
    REASONING = auto()
    CALLS = auto()
    HEADER = auto()  # the words that say what follows


@dataclass(frozen=True)
class Marks:
    """A stretch between two markers.

    Attributes:
        kind: what is between them.
        begin: the first marker.
        ends: what ends the stretch; the end of the answer does so too.
        keep: how much of `begin` belongs to the stretch.
        evidence: what a template of the family contains; the markers themselves where it is empty.
    """

    kind: Kind
    begin: str
    ends: tuple[str, ...] = ()
    keep: str = ""
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Channels:
    """An answer of several messages, each with a header that says what it is.

    Attributes:
        opens: markers that begin a header.
        bodies: markers that end the header, and what follows; None where the words of the header say it.
        ends: markers that end a message.
        evidence: what a template of the family contains.
        header: the form of a header; what has another form is text.
    """

    opens: tuple[str, ...]
    bodies: tuple[tuple[str, Kind | None], ...]
    ends: tuple[str, ...]
    evidence: tuple[str, ...]
    header: re.Pattern[str]


def _reasoning(begin: str, end: str, *more: str) -> Marks:
    return Marks(Kind.REASONING, begin, (end, *more))


def _calls(begin: str, *ends: str, keep: str = "", evidence: tuple[str, ...] = ()) -> Marks:
    return Marks(Kind.CALLS, begin, ends, keep, evidence)


MARKS = (
    _reasoning("<think>", "</think>"),
    _reasoning("<think:opensource>", "</think:opensource>"),
    _reasoning("<seed:think>", "</seed:think>"),
    _reasoning("<mm:think>", "</mm:think>"),
    _reasoning("<thinking>", "</thinking>"),
    _reasoning("<thought>", "</thought>"),
    _reasoning("<reasoning>", "</reasoning>"),
    _reasoning("[THINK]", "[/THINK]"),
    _reasoning("◁think▷", "◁/think▷"),
    _reasoning("<|channel>thought", "<channel|>"),
    _reasoning("<|START_THINKING|>", "<|END_THINKING|>"),
    _reasoning("<|begin_of_thought|>", "<|end_of_thought|>"),
    _reasoning("<|inner_prefix|>", "<|inner_suffix|>"),
    _reasoning("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    _reasoning("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    _calls("<tool_call>", "</tool_call>"),
    _calls("<tool_calls>", "</tool_calls>"),
    _calls("<tool_calls:opensource>", "</tool_calls:opensource>"),
    _calls("<seed:tool_call>", "</seed:tool_call>"),
    _calls("<minimax:tool_call>", "</minimax:tool_call>"),
    _calls("]<]minimax[>[<tool_call>", "]<]minimax[>[</tool_call>"),
    _calls("<TOOLCALL>", "</TOOLCALL>"),
    _calls("<function_call>", "</function_call>"),
    _calls("<function=", "</function>", keep="<function="),
    _calls('<function name="', "</function>", keep='<function name="'),
    _calls("[TOOL_CALLS]"),
    _calls("<|tool_call|>", "<|/tool_call|>"),
    _calls("<|tool_call>", "<tool_call|>"),
    _calls("<|tool_call_start|>", "<|tool_call_end|>"),
    _calls("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    _calls("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    _calls("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
    _calls("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),
    _calls("<|START_ACTION|>", "<|END_ACTION|>"),
    _calls("<|tools_prefix|>", "<|tools_suffix|>"),
    _calls("<|action_start|><|plugin|>", "<|action_end|>"),
    _calls("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
    _calls("<|python_tag|>"),
    _calls("<|function_call|>", "<|message_sep|>"),
    _calls(
        "<|message_sep|>\n\nfunction call<|role_sep|>\n", "<|message_sep|>", evidence=("function call<|role_sep|>",)
    ),
    _calls("Action:\n```json", "```", evidence=("Action:\n```json\n[", "Action:```json\n[")),
    _calls("functools[", keep="[", evidence=("functools[",)),
)

CHANNELS = (
    Channels(
        opens=("<|start|>", "<|channel|>"),
        bodies=(("<|message|>", None),),
        ends=("<|end|>", "<|call|>", "<|return|>", "<|eom|>", "<|eot|>"),
        evidence=("<|channel|>analysis<|message|>", "<|start|>assistant to=self<|message|>"),
        header=re.compile(r"\s*(assistant\b|to=|<\|channel\|>|\S+ to=assistant)"),
    ),
    Channels(
        opens=("<|begin|>",),
        bodies=(("<|think|>", Kind.REASONING), ("<|content|>", Kind.CONTENT), ("<|tool_calls|>", Kind.CALLS)),
        ends=("<|end|>", "<|calls|>", "<|flush|>"),
        evidence=("<|begin|>assistant<|think|>", "<|begin|>assistant<|content|>"),
        header=re.compile(r"\s*(assistant\b|\Z)"),
    ),
    Channels(
        opens=(">>>",),
        bodies=(("\n", None),),
        ends=(),
        evidence=(">>>all\n", ">>>all\\n"),
        header=re.compile(r"[\w.-]+\Z"),
    ),
)

# Markers around the answer itself, without further meaning, each with its evidence.
_FRAMES = (
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_RESPONSE|>"),
    ("<|START_TEXT|>", "<|END_TEXT|>", "<|START_TEXT|>"),
    ("<response>", "</response>", "<response></response>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>", "<|begin_of_solution|>"),
    ("[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]", "[BEGIN FINAL RESPONSE]"),
    ("<|python_start|>", "<|python_end|>", "<|python_start|>"),
    ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|open|>response<|sep|>"),
    ("<|close|>message<|sep|>", "<|end_of_msg|>", "<|open|>response<|sep|>"),
)

# Special tokens inside markers, headers and calls.
_INNER = (
    "<|constrain|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|plugin|>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "｜DSML｜", "[ARGS]", "[CALL_ID]", '<|"|>',
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|tool_call:begin|>", "<|tool_call:name|>",
    "<|tool_call:args|>", "<|tool_call:end|>", "<|open|>", "<|close|>", "<|sep|>", "<|channel>", "<|role_sep|>",
    "]<]minimax[>[", "<tool_call>", "</tool_call>", "<arg_key:opensource>", "</arg_key:opensource>",
    "<arg_value:opensource>", "</arg_value:opensource>", "<tool_call:opensource>", "</tool_call:opensource>",
    "<tool_sep:opensource>",
)  # fmt: skip


@dataclass(frozen=True)
class AnswerFormat:
    """The markers of one model.

    Attributes:
        marks: stretches of reasoning and of calls.
        channels: the form of its messages, where an answer is several.
        frames: markers around the text, which are left out.
        bare_calls: names of functions whose calls may come as JSON or Python alone, without any marker.
    """

    marks: tuple[Marks, ...] = ()
    channels: Channels | None = None
    frames: tuple[str, ...] = ()
    bare_calls: frozenset[str] = field(default_factory=frozenset)

    @property
    def plain(self) -> bool:
        """Whether answers are text and nothing else."""
        return not (self.marks or self.channels or self.frames or self.bare_calls)

    def token_names(self) -> frozenset[str]:
        """Names of special tokens that must stay in the text, as they carry structure."""
        if self.plain:
            return frozenset()
        names = {*self.frames, *_INNER}
        for marks in self.marks:
            names |= {marks.begin, *marks.ends}
        if self.channels is not None:
            names |= {*self.channels.opens, *self.channels.ends, *(marker for marker, _ in self.channels.bodies)}
        return frozenset(names)


PLAIN = AnswerFormat()


def choose_format(source: str, samples: Iterable[str] = (), special_tokens: Collection[str] = ()) -> AnswerFormat:
    """The markers that a model uses.

    Args:
        source: its chat template.
        samples: what the template writes for calls and for reasoning.
        special_tokens: markers that are tokens of their own; they are used whatever the template contains.
    """
    samples = tuple(samples)
    seen = "\n".join((source, *samples))
    channels = next((one for one in CHANNELS if any(words in seen for words in one.evidence)), None)
    marks = [one for one in MARKS if _in_use(one, seen)]
    if channels is None:
        marks += [one for one in MARKS if one not in marks and one.begin in special_tokens]
        marks += _unknown(samples, marks)
    frames = [marker for begin, end, evidence in _FRAMES if evidence in seen for marker in (begin, end)]
    return AnswerFormat(tuple(marks), channels, tuple(frames))


def _in_use(marks: Marks, seen: str) -> bool:
    if marks.evidence:
        return any(words in seen for words in marks.evidence)
    return marks.begin in seen or any(end in seen for end in marks.ends)


_TAG = r"<[^<>\n]{1,40}>|\[[^\[\]\n]{1,40}\]|◁[^◁▷\n]{1,40}▷|\{%[^{}\n]{1,40}%\}"
_BEFORE = re.compile(rf"({_TAG})\s*\Z")
_AFTER = re.compile(rf"\s*({_TAG})")
_SIDES = re.compile(r"begin|start|open|prefix|end|stop|close|suffix|[^a-z]")


def _unknown(samples: Iterable[str], known: Iterable[Marks]) -> list[Marks]:
    """Stretches that only this template marks in its way, found around the probes in what it wrote."""
    found = []
    begins = {marks.begin for marks in known}
    kinds = {marks.kind for marks in known}
    for sample in samples:
        thought = _BEFORE.search(sample.partition(THOUGHT)[0]), _AFTER.match(sample.partition(THOUGHT)[2])
        if THOUGHT in sample and _are_pair(*thought) and Kind.REASONING not in kinds:
            found.append(_between(Kind.REASONING, thought))
        call = re.search(rf"\s*\[?\s*\{{[^{{}}]*\"{CALL_NAME}\".*?{CALL_VALUE}\"\s*\}}\s*\}}\s*\]?", sample, re.DOTALL)
        if call is not None and Kind.CALLS not in kinds:
            around = _BEFORE.search(sample[: call.start()]), _AFTER.match(sample[call.end() :])
            if _are_pair(*around):
                found.append(_between(Kind.CALLS, around))
    return [one for one in found if one.begin not in begins]


def _are_pair(before: re.Match[str] | None, after: re.Match[str] | None) -> bool:
    """Whether two tags have the same name, apart from the sign of an end."""
    if before is None or after is None or before[1] == after[1]:
        return False
    first, second = (_SIDES.sub("", tag[1].lower()) for tag in (before, after))
    return first == second != ""


def _between(kind: Kind, around: tuple[re.Match[str] | None, re.Match[str] | None]) -> Marks:
    before, after = around
    assert before is not None, "found before"
    assert after is not None, "found before"
    return Marks(kind, before[1], (after[1],))
