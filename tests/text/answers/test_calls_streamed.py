"""Calls of every form while they are written: cut anywhere, with markers inside strings, broken off at any place."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text import ChatTemplate
from engine.text.answers.call_records import FORMS
from engine.text.answers.call_stream import Sections
from engine.text.answers.literal_arguments import PYTHON, LiteralArguments
from engine.text.answers.parser import AnswerParser
from engine.text.answers.tool_calls import parameter_types
from tests.support.chats.form_templates import template_of
from tests.support.chats.round_trip import TOOLS, USER, call, conversation, message

TYPES = parameter_types(TOOLS)
IDS = {"ids": lambda form: form.name}
WHOLE = {form.name: ChatTemplate(template_of(form)) for form in FORMS}
FREE = [form for form in FORMS if not form.opens and form.begin]


def written(form, *calls):
    """What comes before the answer, and a model's answer with these calls."""
    template = WHOLE[form.name]
    text = template.render(conversation(message(*calls)))
    prompt = template.render([USER])
    return prompt, text[len(prompt) : text.index("<|im_end|>", len(prompt))] if form.opens != ">>>" else text[
        len(prompt) : text.index("<|eot_id|>")
    ]


def read(form, prompt, pieces):
    """Content, calls, and the calls as their parts add up; asserts that both agree."""
    markers = WHOLE[form.name].answer_format(tools=TOOLS)
    parser = AnswerParser(markers, prompt, TYPES, sections=Sections(form, ["look_up"], TYPES))
    came = [parser.push(piece) for piece in pieces] + [parser.finish()]
    calls = [one for piece in came for one in piece.tool_calls]
    joined = {}
    for part in (one for piece in came for one in piece.call_parts):
        if part.name is not None:
            assert part.index == len(joined), "parts come in the order of the calls"
            joined[part.index] = [part.id, part.name, ""]
        joined[part.index][2] += part.arguments
    assert [tuple(one) for one in joined.values()] == [(one.id, one.name, one.arguments) for one in calls]
    return "".join(piece.content for piece in came), [(one.name, one.arguments) for one in calls], came


def cut(text, size):
    return [text[at : at + size] for at in range(0, len(text), size)]


HARD = {"query": 'ü "x" \\ {[,\n日本 <b>', "number": -12, "more": {"tags": ["a]", "", "}"]}}


@pytest.mark.parametrize("form", FORMS, **IDS)
def test_cut_at_any_border(form):
    prompt, raw = written(form, call(1, **HARD), *([call(2, query="")] if form.several else []))
    expected = [HARD, {"query": ""}] if form.several else [HARD]
    for size in (*range(1, 12), 17, 40, len(raw)):
        content, calls, _ = read(form, prompt, cut(raw, size))
        assert [json.loads(arguments) for _, arguments in calls] == expected, size
        assert not content.strip()
    for at in range(len(raw)):
        _, calls, _ = read(form, prompt, [raw[:at], raw[at:]])
        assert [json.loads(arguments) for _, arguments in calls] == expected, at


@pytest.mark.parametrize("form", FORMS, **IDS)
def test_broken_off_anywhere(form):
    """What has begun is a beginning of the call; what has not is text, and nothing is lost or said twice."""
    prompt, raw = written(form, call(1, **HARD))
    _, ((_, whole),), _ = read(form, prompt, [raw])
    for end in range(len(raw)):
        content, calls, _ = read(form, prompt, cut(raw[:end], 3))
        if calls:
            ((name, arguments),) = calls
            assert name == "look_up"
            assert whole.startswith(arguments.rstrip("}")) or json.loads(arguments) == json.loads(whole), end
        elif not form.opens:
            assert content in (raw[:end], ""), end
            assert content or not raw[:end].removeprefix(form.begin).strip(), end


def streams(form):
    return Sections(form, ["look_up"], TYPES).begin(form.begin or None, "look_up" if form.body else None, 0, "key")


@pytest.mark.parametrize("form", [form for form in FORMS if streams(form)], **IDS)
def test_arguments_are_passed_on_as_they_come(form):
    words = " ".join(f"word{number}" for number in range(40))
    prompt, raw = written(form, call(1, query=words))
    _, _, came = read(form, prompt, cut(raw, 4))
    parts = [part.arguments for piece in came for part in piece.call_parts]
    assert len(parts) > 40
    longest = max(map(len, parts))
    assert longest < 40, "no part is longer than a marker that might have begun"


def test_most_forms_are_streamed():
    """Of the other one, a call's id is known only when its arguments have been written."""
    assert {form.name for form in FORMS if not streams(form)} == {"mistral-v7"}


@pytest.mark.parametrize("form", [form for form in FREE if form.end], **IDS)
def test_markers_inside_strings(form):
    words = f"{form.begin} and {form.end} and <think> and [TOOL_CALLS]"
    if form.parameter and form.tree is None and not form.quoted:
        words = words.replace(form.parameter.partition("$value")[2].strip(), "")
    prompt, raw = written(form, call(1, query=words))
    for size in (1, 5, len(raw)):
        content, calls, _ = read(form, prompt, cut(raw, size))
        assert [json.loads(arguments) for _, arguments in calls] == [{"query": words}]
        assert not content.strip()


@pytest.mark.parametrize("form", [form for form in FREE if form.end], **IDS)
def test_garbage_in_the_middle_is_text(form):
    """Between two calls, and as a call of its own: what cannot be read is content."""
    prompt, raw = written(form, call(1, query="x"))
    garbage = f"{form.begin}@@ no call @@{form.end}"
    for size in (1, 6, 1000):
        content, calls, _ = read(form, prompt, cut(f"{raw}\nhm {garbage} so\n{raw}", size))
        assert len(calls) == 2
        assert content == f"hm {garbage} so"


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(st.sampled_from(["number", "more"]), st.integers(), max_size=1),
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r"), max_size=40),
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
)
@pytest.mark.parametrize(
    "name",
    ["hermes", "qwen3-coder", "kimi-k2", "deepseek-v3.2", "glm-4.7", "harmony", "llama3", "lfm2", "pythonic", "gemma-4",
     "minimax-m3"],
)  # fmt: skip
def test_any_text_and_any_borders(name, rest, text, sizes):
    form = next(one for one in FORMS if one.name == name)
    arguments = {"query": text, **{key: value for key, value in rest.items() if key == "number"}}
    prompt, raw = written(form, call(1, **arguments))
    pieces, at = [], 0
    while at < len(raw):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(raw[at : at + size])
        at += size
    _, calls, _ = read(form, prompt, pieces)
    assert [json.loads(made) for _, made in calls] == [arguments]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text("aü\"'\\\n{},", max_size=5)
VALUES = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text("ab'", max_size=2), LEAVES, max_size=2)
VALUES = VALUES | st.lists(VALUES, max_size=2) | st.tuples(VALUES, LEAVES)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3), st.integers(1, 9))
def test_python_literals_become_the_json_of_their_values(values, size):
    """As Python writes them; and what is cut off anywhere becomes JSON when it is closed."""
    text = ", ".join(f"{key}={value!r}" for key, value in values.items()) + ") and so on"
    whole, left, written = LiteralArguments(PYTHON), "", "{"
    for piece in cut(text, size):
        if whole.done:
            left += piece
            continue
        left, more = whole.read(left + piece)
        written += more
    assert left == " and so on"
    assert json.loads(written) == json.loads(json.dumps(values))
    for end in range(len(text) - len(left)):
        begun = LiteralArguments(PYTHON)
        _, more = begun.read(text[:end])
        assert written.startswith("{" + more)
        json.loads("{" + more + begun.close())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"""'it\'s "so"'""", """it's "so\""""),
        (r'"\x41\u00fc\U0001f600\101\0 \d\/"', "A\u00fc\U0001f600A\0 \\d/"),
        (r'"\ud83d\ude00"', "\U0001f600"),
        ('"""a "b" c"""', 'a "b" c'),
        ("[1_000, 0x1F, .5, -2e3, True, null, 'x',]", [1000, 31, 0.5, -2000.0, True, None, "x"]),
        ("{'a': (1, 2), 3: {}}", {"a": [1, 2], "3": {}}),
        ("somewhere", "somewhere"),
    ],
)
def test_python_in_all_its_spellings(text, value):
    for size in (1, 2, 3, 100):
        reader, left, written = LiteralArguments(PYTHON), "", "{"
        for piece in cut(f"key = {text})", size):
            left, more = reader.read(left + piece)
            written += more
        assert reader.done
        assert json.loads(written) == {"key": value}
