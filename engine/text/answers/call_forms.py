"""Chooses the form of a model's calls by what its chat template writes. Knows templates only as text."""

import json
import re
from dataclasses import replace

from engine.errors import InvalidRequestError
from engine.text.answers.call_form import CallForm, filled
from engine.text.answers.call_records import BY_NAME, FORMS, GENERIC
from engine.text.answers.formats import AnswerFormat, Kind
from engine.text.probes import CALL_KEYS, CALL_NAME, CALL_VALUE


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
    probes = [probe(form, index) for index in (("0", "1") if "$index" in form.call else ("0",))]
    if exact:
        return any(one in sample for one in probes)
    return any(_squeezed(one) in _squeezed(sample) for one in probes)


def probe(form: CallForm, index: str = "0") -> str:
    """The call of engine.text.probes in a form; families count calls from 0 or from 1."""
    if form.parameter:
        value = f'"{CALL_VALUE}"' if form.quoted else CALL_VALUE
        if form.tree is not None:
            value = CALL_VALUE.join(form.tree.string)
        each = (filled(form.parameter, key=key, value=value, type="string") for key in CALL_KEYS)
        arguments = form.separator.join(each)
    else:
        arguments = json.dumps(dict.fromkeys(CALL_KEYS, CALL_VALUE))
    call = filled(form.call, name=CALL_NAME, arguments=arguments, id="qzidnine9", index=index)
    return form.begin + form.around[0] + call + form.around[1] + form.end


def sample_of(form: CallForm, name: str, arguments: str) -> str:
    """A call with JSON text as its arguments, for people and models to read."""
    call = filled(form.call, name=name, arguments=arguments, id="000000001", index="0")
    return form.begin + form.around[0] + call + form.around[1] + form.end


def _squeezed(text: str) -> str:
    return re.sub(r"\s", "", text.replace("'", '"'))


_PAIRS = r",\s*".join(rf'"{key}":\s*"{CALL_VALUE}"' for key in CALL_KEYS)
_ARGUMENTS = re.compile(rf"\{{\s*{_PAIRS}\s*\}}")


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
