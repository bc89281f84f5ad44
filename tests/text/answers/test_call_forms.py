"""Which form of calls a template has, found by what it writes; and what a limited thought ends with."""

import pytest

from engine import InvalidRequestError
from engine.text import ChatTemplate, form_named
from engine.text.answers.call_forms import FORMS, GENERIC, choose_form, probe, sample_of
from engine.text.answers.formats import MARKS, AnswerFormat
from engine.text.answers.parser import AnswerParser
from engine.text.answers.rules import choose_tools
from tests.support.chats.chat_families import FAMILIES

TEXT_FORMS = [form for form in FORMS if not form.opens]


def markers_of(form):
    marks = tuple(one for one in MARKS if one.begin == form.begin)
    return AnswerFormat(marks, bare_calls=frozenset() if form.begin else frozenset({"qzlook"}))


@pytest.mark.parametrize("form", TEXT_FORMS, ids=lambda form: form.name)
def test_a_form_is_recognised_by_what_it_writes(form):
    assert choose_form(markers_of(form), "", "assistant: " + probe(form) + "<end>") == form


@pytest.mark.parametrize("form", TEXT_FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_what_a_form_writes_is_read_however_it_is_cut(form, size):
    parser, raw = AnswerParser(markers_of(form)), probe(form)
    pieces = [parser.push(raw[start : start + size]) for start in range(0, len(raw), size)] + [parser.finish()]
    (call,) = [call for piece in pieces for call in piece.tool_calls]
    assert (call.name, call.arguments) == ("qzlook", '{"qzkey": "qzvalue", "qzmore": "qzvalue"}')
    assert not "".join(piece.content for piece in pieces).strip()


@pytest.mark.parametrize("form", TEXT_FORMS, ids=lambda form: form.name)
def test_a_call_cut_at_any_place_is_text_or_a_call_and_no_error(form):
    raw = probe(form)
    for end in range(len(raw)):
        parser = AnswerParser(markers_of(form))
        pieces = [parser.push(raw[:end]), parser.finish()]
        calls = [call for piece in pieces for call in piece.tool_calls]
        assert {call.name for call in calls} <= {"qzlook"}


@pytest.mark.parametrize("form", [form for form in TEXT_FORMS if form.loose and form.begin], ids=lambda form: form.name)
def test_markers_inside_strings_are_text(form):
    words = f'a {form.end or form.begin} b {form.begin} \\" c'
    parser = AnswerParser(markers_of(form))
    raw = sample_of(form, "look", f'{{"q": "{words}"}}')
    pieces = [parser.push(raw), parser.finish()]
    assert [call.name for piece in pieces for call in piece.tool_calls] == ["look"]


def test_a_template_of_its_own_gives_a_form_of_its_own():
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
        '<do_it>{"fn": 1, "name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</do_it>'
        "{% endfor %}\n{% endfor %}"
    )
    form = ChatTemplate(source).call_form()
    assert (form.begin, form.end) == ("<do_it>", "</do_it>")
    assert form.call == '{"fn": 1, "name": "$name", "arguments": $arguments}'


def test_families_have_forms():
    names = {name: ChatTemplate(source).call_form().name for name, source in FAMILIES.items()}
    assert names["chatml"] == "hermes"
    assert names["channels"] == "harmony"
    assert set(names.values()) <= {form.name for form in FORMS} | {GENERIC.name, "template"}


def test_wrong_names_and_choices():
    with pytest.raises(InvalidRequestError, match="allowed: auto, hermes"):
        form_named("herms")
    with pytest.raises(InvalidRequestError, match="no tools"):
        choose_tools([], "required", None)
    assert choose_tools([{"name": "f"}], "none", None) is None
