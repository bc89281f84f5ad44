"""Chat templates: helpers, variants, hostile templates, malformed conversations. Families: test_chat_families.py."""

import pytest

from engine.errors import InvalidRequestError, TokenizerError
from engine.text import ChatTemplate, Tokenizer
from tests.support.vocabularies import SPM, bpe_metadata, spm_metadata

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Über <b>?"},
]
TOOLS = [{"type": "function", "function": {"name": "clock", "description": "Zeit für <alle>"}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source, messages=TALK, **options):
    return ChatTemplate(source, special_tokens=TOKENS).render(messages, **options)


def test_words_marked_for_training_are_shown():
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %},{% endfor %}"
    assert render(source) == "Be brief.,Hi,Hello.,Über <b>?,"


def test_loop_helpers_survive_the_counting():
    source = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last else ',' }}"
        "{{ loop.previtem.role if not loop.first }}{{ loop.nextitem.role if not loop.last }}"
        "{% if loop.index == 3 %}{% break %}{% endif %} {% else %}none{% endfor %}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{% for x in missing %}{% else %}-{% endfor %}"
    )
    assert render(source) == "1/4,user 2/4,systemassistant 3/4,useruser" + "a1-"


def test_missing_special_tokens_write_nothing():
    assert ChatTemplate("[{{ bos_token }}]").render(TALK) == "[]"


# ----------------------------------------------------------------------------------------------------- from metadata


def test_from_metadata():
    metadata = spm_metadata()
    assert ChatTemplate.from_metadata(metadata, SPM) is None
    metadata["tokenizer.chat_template"] = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"
    template = ChatTemplate.from_metadata(metadata, SPM)
    text = template.render(TALK[1:2])
    assert text == "<s>[INST] Hi [/INST]"
    ids = SPM.encode_rendered(text)
    assert ids.count(SPM.bos_id) == 1
    assert ids[0] == SPM.bos_id


def test_named_variants():
    metadata = bpe_metadata() | {
        "tokenizer.chat_templates": ["tool_use", "rag"],
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "with tools",
        "tokenizer.chat_template.rag": "{{ documents[0] }}",
    }
    template = ChatTemplate.from_metadata(metadata, Tokenizer.from_metadata(metadata))
    assert template.render(TALK) == "plain"
    assert template.render(TALK, tools=TOOLS) == "with tools"
    assert template.render(TALK, template="rag", documents=["paper"]) == "paper"
    with pytest.raises(InvalidRequestError, match=r"no chat template named 'x'; its named ones: 'tool_use', 'rag'"):
        template.render(TALK, template="x")
    del metadata["tokenizer.chat_template"]
    assert ChatTemplate.from_metadata(metadata, None).render(TALK) == "with tools"


def test_template_of_a_wrong_type():
    with pytest.raises(TokenizerError, match=r"tokenizer\.chat_template must be a string, found int"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": 3}, None)


# -------------------------------------------------------------------------------------------------- malformed messages


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "must be a list of mappings .* found str"),
        ({"role": "user"}, "found dict"),
        (None, "found NoneType"),
        ([], "at least one message"),
        (["hi"], r"messages\[0\] must be a mapping .* found str"),
        ([{"content": "x"}], r"messages\[0\]\['role'\] must be a string"),
        ([{"role": "", "content": "x"}], "must be a string"),
        ([TALK[0], {"role": "user"}], r"messages\[1\] has no 'content'"),
        ([{"role": "user", "content": 3}], "found int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"\['content'\]\[0\] is of type 'image_url'"),
        ([{"role": "assistant", "tool_calls": "x"}], "must be a list of mappings"),
    ],
)
def test_malformed_messages(messages, message):
    with pytest.raises(InvalidRequestError, match=message):
        render("x", messages)


def test_malformed_tools():
    with pytest.raises(InvalidRequestError, match=r"tools\[0\] must be a mapping"):
        render("x", tools=[print])
    with pytest.raises(InvalidRequestError, match="tools must be a list"):
        render("x", tools={"a": 1})


def test_a_template_that_trips_over_the_messages():
    with pytest.raises(InvalidRequestError, match=r"UndefinedError: .*no attribute 'name'"):
        render("{{ messages[0].name.upper() }}")


# ---------------------------------------------------------------------------------------------------- hostile templates


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ x | no_such_filter }}",
        "{% include 'other' %}",
        "{{" + "(" * 20000 + "1" + ")" * 20000 + "}}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(a=10) %}{% for i in range(60) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
        "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a %}{{ ns.a * 2 }}{% endset %}{% endfor %}",
        "{% set ns = namespace(a=['x']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=9999999999) }}",
        "{{ ('{:9999999999}' | attr('format'))(1) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '%*d' | format(9999999999, 1) }}",
        "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
        "{% set a = 'a' * 1000000 %}{{ a | replace('a', a) }}",
        "{% set a = 'a' * 1000000 %}{{ a.join(a) }}",
        "{{ range(100000) | join('a' * 100000) }}",
        "{{ {'a': 1} | tojson(indent=10 ** 9) }}",
        "{{ ('\n' * 100000) | indent(900) }}",
    ],
)
def test_hostile_templates_are_stopped(source):
    with pytest.raises((TokenizerError, InvalidRequestError), match="the model's chat template"):
        render(source)


def test_steps_are_counted_anew_for_each_render():
    template = ChatTemplate("{% for a in range(60000) %}{% endfor %}x")
    assert [template.render(TALK) for _ in range(20)] == ["x"] * 20


def test_time_is_bounded(monkeypatch):
    monkeypatch.setattr("engine.text.templates.sandbox.MAX_SECONDS", 0.05)
    with pytest.raises(TokenizerError, match=r"more than 0\.05 seconds"):
        render("{% for i in range(100000) %}{% set x = range(10000) | list | sort %}{% endfor %}")


def test_the_source_is_bounded():
    with pytest.raises(TokenizerError, match="at most 1000000"):
        render("x" * 1_000_001)
