"""How models write calls, to the character: one record for each family.

What is read is in tool_calls.py; these forms are what constraints force. A record is chosen by what the chat template
writes for a probe, so a new model of a known family needs no entry. This module knows templates only as text.
"""

import re
from dataclasses import KW_ONLY, dataclass, replace

from engine.errors import InvalidRequestError
from engine.text.answers.formats import AnswerFormat, Kind
from engine.text.probes import CALL_NAME, CALL_VALUE

PLACES = re.compile(r"\$(name|arguments|id|index|key|value)\b")
"""Filled in: the name of the function, its arguments, the id of the call, its number; a parameter's name and value."""


@dataclass(frozen=True)
class CallForm:
    """The text of calls in one family.

    A section of calls is begin, first, one or several calls, last, end.

    Attributes:
        name: of the record, as `--tool-format` takes it.
        begin: the marker that opens calls; "" where the call itself is the first text.
        call: one call, with $name, $arguments, $id and $index in it.
        end: the marker that closes calls; "" where the end of the answer does.
        between: what is between two calls of one section; None: each call has a section of its own.
        around: what is before the first and behind the last call of a section.
        several: whether there can be more than one call.
        parameter: one parameter with $key and $value, where the arguments are not one JSON object.
        quoted: whether values that are strings are written as in JSON in `parameter`, or as they are.
        separator: what is between two parameters.
        other_parameter: the same for values that are no strings, where that differs.
        opens: the marker that opens a header, in families whose answers are several messages.
        thought: a message that may come before the calls there: its begin and its end.
    """

    name: str
    begin: str
    call: str
    end: str = ""
    _: KW_ONLY
    between: str | None = None
    around: tuple[str, str] = ("", "")
    several: bool = True
    parameter: str = ""
    quoted: bool = False
    separator: str = ""
    other_parameter: str = ""
    opens: str = ""
    thought: tuple[str, str] = ("", "")

    @property
    def loose(self) -> bool:
        """Whether white space outside of values may be other than written here, as it is in JSON."""
        return not self.parameter and '"$name"' in self.call


_JSON = '{"name": "$name", "arguments": $arguments}'
_XML = "\n<function=$name>\n$arguments</function>\n"
_DSML = '\n<｜DSML｜invoke name="$name">\n$arguments</｜DSML｜invoke>'
_COHERE = '{"tool_call_id": "$index", "tool_name": "$name", "parameters": $arguments}'


def _dsml(name: str, word: str) -> CallForm:
    parameter = '<｜DSML｜parameter name="$key" string="true">$value</｜DSML｜parameter>\n'
    return CallForm(
        name,
        f"<｜DSML｜{word}>",
        _DSML,
        f"</｜DSML｜{word}>",
        between="",
        around=("", "\n"),
        parameter=parameter,
        other_parameter=parameter.replace("true", "false"),
    )


def _list(name: str, begin: str, call: str, end: str = "") -> CallForm:
    return CallForm(name, begin, call, end, between=", ", around=("[", "]"))


def _python(name: str, begin: str, end: str) -> CallForm:
    return replace(_list(name, begin, "$name($arguments)", end), parameter="$key=$value", quoted=True, separator=", ")


FORMS = (
    CallForm("hermes", "<tool_call>", f"\n{_JSON}\n", "</tool_call>"),
    CallForm("qwen3-coder", "<tool_call>", _XML, "</tool_call>", parameter="<parameter=$key>\n$value\n</parameter>\n"),
    CallForm(
        "seed-oss", "<seed:tool_call>", _XML, "</seed:tool_call>", parameter="<parameter=$key>$value</parameter>\n"
    ),
    CallForm("llama3", "", '{"name": "$name", "parameters": $arguments}', several=False),
    _list("mistral-v7", "[TOOL_CALLS]", '{"name": "$name", "arguments": $arguments, "id": "$id"}'),
    CallForm("mistral-v11", "[TOOL_CALLS]", "$name[ARGS]$arguments"),
    CallForm("mistral-v11-id", "[TOOL_CALLS]", "$name[CALL_ID]$id[ARGS]$arguments"),
    CallForm(
        "deepseek-v3",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>$name\n```json\n$arguments\n```<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        between="\n",
    ),
    CallForm(
        "deepseek-v3.1",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>$name<｜tool▁sep｜>$arguments<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        between="",
    ),
    _dsml("deepseek-v3.2", "function_calls"),
    _dsml("deepseek-v4", "tool_calls"),
    CallForm(
        "harmony",
        "<|channel|>",
        "commentary to=functions.$name <|constrain|>json<|message|>$arguments",
        several=False,
        opens="<|start|>",
        thought=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    ),
    CallForm(
        "solar",
        "<|tool_calls|>",
        "<|tool_call:begin|>$id<|tool_call:name|>$name<|tool_call:args|>$arguments<|tool_call:end|>",
        between="",
        opens="<|begin|>",
        thought=("<|think|>", "<|end|><|begin|>assistant"),
    ),
    CallForm(
        "glm",
        "<tool_call>",
        "$name\n$arguments",
        "</tool_call>",
        parameter="<arg_key>$key</arg_key>\n<arg_value>$value</arg_value>\n",
    ),
    CallForm(
        "glm-4.7",
        "<tool_call>",
        "$name$arguments",
        "</tool_call>",
        parameter="<arg_key>$key</arg_key><arg_value>$value</arg_value>",
    ),
    CallForm(
        "kimi-k2",
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>functions.$name:$index<|tool_call_argument_begin|>$arguments<|tool_call_end|>",
        "<|tool_calls_section_end|>",
        between="",
    ),
    CallForm(
        "minimax-m2",
        "<minimax:tool_call>",
        '<invoke name="$name">\n$arguments</invoke>\n',
        "</minimax:tool_call>",
        between="",
        around=("\n", ""),
        parameter='<parameter name="$key">$value</parameter>\n',
    ),
    _list("phi-4-mini", "<|tool_call|>", _JSON, "<|/tool_call|>"),
    _list("granite", "<|tool_call|>", _JSON),
    CallForm(
        "command-r7b",
        "<|START_ACTION|>",
        _COHERE,
        "<|END_ACTION|>",
        between=",\n    ",
        around=("[\n    ", "\n]"),
    ),
    CallForm(
        "command-r-plus",
        "Action:\n```json",
        '{"tool_name": "$name", "parameters": $arguments}',
        "```",
        between=",\n    ",
        around=("\n[\n    ", "\n]"),
    ),
    _list("nemotron", "<TOOLCALL>", _JSON, "</TOOLCALL>"),
    _python("lfm2", "<|tool_call_start|>", "<|tool_call_end|>"),
    _python("pythonic", "", ""),
    CallForm("functionary", "<function=", "$name>$arguments", "</function>"),
    CallForm(
        "minicpm",
        '<function name="',
        '$name">$arguments',
        "</function>",
        parameter='<param name="$key">$value</param>',
    ),
    _list("apertus", "<|tools_prefix|>", '{"$name": $arguments}', "<|tools_suffix|>"),
    CallForm("firefunction", "functools[", _JSON, between=", ", around=("", "]")),
)
"""Where several forms fit a template, the first one is taken."""

BY_NAME = {form.name: form for form in FORMS}
GENERIC = replace(BY_NAME["hermes"], name="generic")
"""For a template that shows no call at all; the parser reads it in every family."""


def choose_form(markers: AnswerFormat, source: str, sample: str | None) -> CallForm:
    """The form of calls of a model.

    Args:
        markers: how it marks calls.
        source: its chat template.
        sample: what the template writes for the call of engine.text.probes; None where it writes none.
    """
    if markers.channels is not None:
        known = [form for form in FORMS if form.opens in markers.channels.opens]
        return next((form for form in known if form.begin in source), GENERIC)
    begins = [marks.begin for marks in markers.marks if marks.kind is Kind.CALLS]
    if sample is not None:
        for exact in (True, False):
            fitting = [form for form in FORMS if not form.opens and _fits(form, sample, exact=exact)]
            if fitting:
                return max(fitting, key=lambda form: bool(form.begin))  # one with a marker, the first of these
        found = _derived(sample, markers)
        if found is not None:
            return found
    candidates = [form for form in FORMS if form.begin in begins and not form.opens]
    if candidates:
        return max(candidates, key=lambda form: form.end in source)
    for marks in markers.marks:
        if marks.kind is Kind.CALLS:
            return replace(GENERIC, begin=marks.begin, end=marks.ends[0] if marks.ends else "")
    return GENERIC


def _fits(form: CallForm, sample: str, *, exact: bool) -> bool:
    """Whether a template writes a call in this form, to the last space or but for spaces and kinds of quotes."""
    return probe(form) in sample if exact else _squeezed(probe(form)) in _squeezed(sample)


def probe(form: CallForm) -> str:
    """The call of engine.text.probes in a form."""
    if form.parameter:
        value = f'"{CALL_VALUE}"' if form.quoted else CALL_VALUE
        arguments = _filled(form.parameter, key="qzkey", value=value)
    else:
        arguments = f'{{"qzkey": "{CALL_VALUE}"}}'
    call = _filled(form.call, name=CALL_NAME, arguments=arguments, id="qzidnine9", index="0")
    return form.begin + form.around[0] + call + form.around[1] + form.end


def sample_of(form: CallForm, name: str, arguments: str) -> str:
    """A call with JSON text as its arguments, for people and models to read."""
    call = _filled(form.call, name=name, arguments=arguments, id="000000001", index="0")
    return form.begin + form.around[0] + call + form.around[1] + form.end


def _filled(pattern: str, **values: str) -> str:
    return PLACES.sub(lambda place: values[place[1]], pattern)


def _squeezed(text: str) -> str:
    return re.sub(r"\s", "", text.replace("'", '"'))


_ARGUMENTS = re.compile(rf'\{{\s*"qzkey":\s*"{CALL_VALUE}"\s*\}}')


def _derived(sample: str, markers: AnswerFormat) -> CallForm | None:
    """A form of the template's own, read off what it writes: a name and JSON between markers that are known."""
    found = list(_ARGUMENTS.finditer(sample))
    if not found:
        return None
    arguments = found[-1]  # examples may come before it
    for marks in markers.marks:
        start = sample.rfind(marks.begin, 0, arguments.start())
        if marks.kind is not Kind.CALLS or start < 0:
            continue
        before = sample[start + len(marks.begin) : arguments.start()]
        if marks.keep or before.count(CALL_NAME) != 1 or len(before) > 200:
            continue
        ends = [sample.find(end, arguments.end()) for end in marks.ends]
        stop = min((end for end in ends if end >= 0), default=-1)
        if marks.ends and stop < 0:
            continue
        rest = sample[arguments.end() : stop] if marks.ends else _closing(before)
        end = next((one for one in marks.ends if sample.startswith(one, stop)), "")
        call = (before.replace("$", "") + "$arguments" + rest).replace(CALL_NAME, "$name").replace("qzidnine9", "$id")
        in_list = re.fullmatch(r"(\s*\[\s*)(\{.*\})(\s*\]\s*)", call, re.DOTALL)
        if in_list is not None:
            return CallForm("template", marks.begin, in_list[2], end, between=", ", around=(in_list[1], in_list[3]))
        return CallForm("template", marks.begin, call, end, several=bool(end))
    return None


def _closing(text: str) -> str:
    """The brackets that a JSON text leaves open, closed."""
    return "".join({"{": "}", "[": "]"}[c] for c in reversed(re.sub(r'"[^"]*"|[^{\[]', "", text)))


def form_named(name: str) -> CallForm | None:
    """The form of a name; None for "auto".

    Raises:
        InvalidRequestError: there is none of that name.
    """
    if name == "auto":
        return None
    if name == GENERIC.name:
        return GENERIC
    if name not in BY_NAME:
        allowed = ", ".join(("auto", *BY_NAME, GENERIC.name))
        raise InvalidRequestError(f"tool_format is {name!r}; allowed: {allowed}")
    return BY_NAME[name]
