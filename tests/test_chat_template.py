"""Chat templates: families of templates in our own wording, helpers, hostile templates, malformed conversations."""

from datetime import datetime

import pytest
from test_tokenizer import SPM, bpe_metadata, spm_metadata

from engine.errors import InvalidRequestError, TokenizerError
from engine.text import ChatTemplate, Tokenizer

CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content or '' }}{%- endgeneration %}
        {%- for call in message.tool_calls or [] %}
            {{- '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}
        {%- endfor %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think></think>' }}
    {%- endif %}
{%- endif %}
"""

HEADERS = """{{ bos_token }}
{%- macro turn(role, text) -%}
<|start|>{{ role }}<|stop|>

{{ text | trim }}<|eot|>
{%- endmacro -%}
{%- set ns = namespace(system='') -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set ns.system = messages[0]['content'] -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif -%}
{{ turn('system', 'Today: ' + date_string + '\\n' + ns.system) }}
{%- for m in messages %}{{ turn(m['role'], m['content']) }}{% endfor -%}
{%- if add_generation_prompt %}<|start|>assistant<|stop|>

{% endif -%}
"""

BRACKETS = """{{ bos_token }}
{%- for message in messages -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate between user and assistant') }}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {%- if tools is not none and loop.last -%}
            [TOOLS] {{ tools | tojson }}[/TOOLS]
        {%- endif -%}
        [INST] {{ message.content }} [/INST]
    {%- else -%}
        {{ ' ' ~ message.content ~ eos_token }}
    {%- endif -%}
{%- endfor -%}
"""

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


def test_chatml():
    assert render(CHATML) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello."
        "<|im_end|>\n<|im_start|>user\nÜber <b>?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(CHATML, TALK[1:2], add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"
    assert render(CHATML, TALK[1:2], enable_thinking=False).endswith("<|im_start|>assistant\n<think></think>")


def test_chatml_with_tools():
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "Zürich"}'}}
    talk = [TALK[1], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "9:00"}]
    assert render(CHATML, talk, tools=TOOLS) == (
        '<|im_start|>system\nTools:\n{"type": "function", "function": {"name": "clock", '
        '"description": "Zeit für <alle>"}}'
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        '<call>clock {"zone": "Zürich"}</call><|im_end|>\n<|im_start|>tool\n9:00<|im_end|>\n<|im_start|>assistant\n'
    )
    assert talk[1]["tool_calls"][0]["function"]["arguments"] == '{"zone": "Zürich"}'  # the caller's own is untouched


def test_headers_with_date():
    template = ChatTemplate(HEADERS, special_tokens=TOKENS, now=lambda: datetime(2026, 3, 1))
    assert template.render(TALK[:2]) == (
        "<s><|start|>system<|stop|>\n\nToday: 01 Mar 2026\nBe brief.<|eot|>"
        "<|start|>user<|stop|>\n\nHi<|eot|><|start|>assistant<|stop|>\n\n"
    )
    assert "Today: 26 Jul 2024\n" in render(HEADERS, date_string="26 Jul 2024") + "\n"


def test_brackets():
    assert render(BRACKETS, TALK[1:]) == "<s>[INST] Hi [/INST] Hello.</s>[INST] Über <b>? [/INST]"
    assert '[/INST] Hello.</s>[TOOLS] [{"type": "function"' in render(BRACKETS, TALK[1:], tools=TOOLS)
    with pytest.raises(InvalidRequestError, match="does not take these messages: roles must alternate"):
        render(BRACKETS, TALK)


def test_loop_helpers_survive_the_counting():
    source = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last else ',' }}"
        "{{ loop.previtem.role if not loop.first }}{{ loop.nextitem.role if not loop.last }}"
        "{% if loop.index == 3 %}{% break %}{% endif %} {% else %}none{% endfor %}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{% for x in missing %}{% else %}-{% endfor %}"
    )
    assert render(source) == "1/4,user 2/4,systemassistant 3/4,useruser" + "a1-"


def test_white_space_rules():
    source = "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}\n"
    assert render(source, TALK[:2]) == "system\nuser\n"


def test_tojson_options():
    assert render("{{ {'b': '<é>', 'a': [1]} | tojson(sort_keys=True) }}") == '{"a": [1], "b": "<é>"}'
    assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'
    assert render("{{ {'a': 1} | tojson(separators=(',', ':')) }}") == '{"a":1}'
    assert render("{{ 'é' | tojson(ensure_ascii=True) }}") == '"\\u00e9"'


def test_missing_special_tokens_write_nothing():
    assert ChatTemplate("[{{ bos_token }}]").render(TALK) == "[]"


# ----------------------------------------------------------------------------------------------------- from metadata


def test_from_metadata():
    metadata = spm_metadata()
    assert ChatTemplate.from_metadata(metadata, SPM) is None
    metadata["tokenizer.chat_template"] = BRACKETS
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
        ([{"role": "user", "content": None}], "found NoneType"),
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


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one\ntwo"


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
    monkeypatch.setattr("engine.text.template_sandbox.MAX_SECONDS", 0.05)
    with pytest.raises(TokenizerError, match=r"more than 0\.05 seconds"):
        render("{% for i in range(100000) %}{% set x = range(10000) | list | sort %}{% endfor %}")


def test_the_source_is_bounded():
    with pytest.raises(TokenizerError, match="at most 1000000"):
        render("x" * 1_000_001)
