"""Templates in the styles of the real families: rendered as Hugging Face renders them, and stopped at their ends.

The templates are our own; each uses the constructs that its family's use. The truth is jinja2 set up by Hugging Face's
description of its chat templates (transformers itself, 5.23, gave the same texts when these tests were written), and
texts written by hand.
"""

import itertools
import json
from datetime import datetime
from functools import cache

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.errors import InvalidRequestError, TokenizerError
from engine.text import ChatTemplate, Tokenizer
from tests.support.chats.chat_families import FAMILIES
from tests.support.models.gguf_builder import bpe_tokenizer, tiny_llama
from tests.support.vocabularies import SPM_PIECES, bpe_metadata, spm_metadata

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
NOW = datetime(2026, 3, 1)

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Hi, wer bist <du>? "}
ANSWER = {"role": "assistant", "content": "A model."}
THOUGHT = {"role": "assistant", "content": "<think>\nWho am I?\n</think>\n\nA model."}
MORE = {"role": "user", "content": "Time in Zürich?"}
ARGUMENTS = {"zone": "Zürich", "digits": 2}
CALL = {"id": "abc123XYZ", "type": "function", "function": {"name": "clock", "arguments": ARGUMENTS}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"time": "9:00"}', "tool_call_id": "abc123XYZ"}
PARAMETERS = {
    "type": "object",
    "properties": {
        "zone": {"type": "string"},
        "unit": {"enum": ["s", "m"], "default": "s"},
        "spans": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    },
    "required": ["zone"],
}
TOOLS = [
    {"type": "function", "function": {"name": "clock", "description": "Zeit & <Ort>", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "ping", "description": "Nothing"}},
]
TALKS = [
    [ASK],
    [SYSTEM, ASK],
    [ASK, ANSWER],
    [SYSTEM, ASK, THOUGHT, MORE],
    [ASK, THOUGHT, MORE, THOUGHT],
    [SYSTEM, ASK, CALLS, RESULT],
    [ASK, CALLS, RESULT, RESULT, ANSWER, MORE],
    [ASK, ASK],
    [ANSWER, ASK],
    [{"role": "critic", "content": "x"}],
]
OPTIONS = [
    {},
    {"add_generation_prompt": False},
    {"enable_thinking": False, "reasoning_effort": "high", "date_string": "1 May 2025"},
    {"tools": TOOLS},
    {"tools": TOOLS, "tools_in_user_message": False},
    {"documents": [{"title": "A", "text": "b"}, {"text": "c"}]},
]


@cache
def reference(source):
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": NOW.strftime}
    return environment.from_string(source)


def as_hugging_face(source, messages, **names):
    """The text, or None where the template refuses or fails."""
    common = {"tools": None, "documents": None, "add_generation_prompt": True}
    try:
        return reference(source).render(messages=messages, **TOKENS, **(common | names))
    except Exception:
        return None


@cache
def ours(source):
    return ChatTemplate(source, special_tokens=TOKENS, now=lambda: NOW)


def render(source, messages, **names):
    return ours(source).render(messages, **names)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_renders_as_hugging_face_renders_it(name):
    texts = set()
    for messages, options in itertools.product(TALKS, OPTIONS):
        if name == "wide_bars" and CALLS in messages:
            continue  # wants the arguments as text: below
        if name == "turns":  # it would write "None"
            messages = [{**message, "content": ""} if message is CALLS else message for message in messages]
        expected = as_hugging_face(FAMILIES[name], messages, **options)
        if expected is None and messages[0] is SYSTEM:  # what the user says begins with it instead
            together = {**messages[1], "content": f"{SYSTEM['content']}\n{messages[1]['content']}"}
            expected = as_hugging_face(FAMILIES[name], [together, *messages[2:]], **options)
        if name == "bars" and any(message["role"] in ("tool", "critic") for message in messages):
            with pytest.raises(InvalidRequestError, match="loses the text of messages of the role"):
                render(FAMILIES[name], messages, **options)
        elif expected is None:
            with pytest.raises(InvalidRequestError, match="chat template"):
                render(FAMILIES[name], messages, **options)
        else:
            assert render(FAMILIES[name], messages, **options) == expected
            texts.add(expected)
    assert len(texts) > 5


EXPECTED = {
    "chatml": (
        [SYSTEM, ASK, THOUGHT, MORE],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi, wer bist <du>? <|im_end|>\n"
        "<|im_start|>assistant\nA model.<|im_end|>\n<|im_start|>user\nTime in Zürich?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "headers": (
        [SYSTEM, ASK],
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 01 Mar 2026\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi, wer bist <du>?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "brackets": (
        [SYSTEM, ASK, CALLS, RESULT, ANSWER, MORE],
        '<s>[INST] Hi, wer bist <du>? [/INST][TOOL_CALLS] [{"name": "clock", "arguments": {"zone": "Zürich", '
        '"digits": 2}, "id": "abc123XYZ"}]</s>[TOOL_RESULTS] {"content": {"time": "9:00"}, "call_id": "abc123XYZ"}'
        "[/TOOL_RESULTS] A model.</s>[INST] Be brief.\n\nTime in Zürich?[/INST]",
    ),
    "turns": (
        [ASK, ANSWER, MORE],
        "<s><start_of_turn>user\nHi, wer bist <du>?<end_of_turn>\n<start_of_turn>model\nA model.<end_of_turn>\n"
        "<start_of_turn>user\nTime in Zürich?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "bars": (
        [SYSTEM, ASK],
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi, wer bist <du>? <|end|>\n<|assistant|>\n",
    ),
    "wide_bars": (
        [SYSTEM, ASK, THOUGHT, MORE],
        "<s>Be brief.<｜User｜>Hi, wer bist <du>? <｜Assistant｜>\n\nA model.<｜end▁of▁sentence｜>"
        "<｜User｜>Time in Zürich?<｜Assistant｜><think>\n",
    ),
    "channels": (
        [ASK, {**CALLS, "thinking": "Let me see."}, RESULT],
        "<|start|>system<|message|>Date: 2026-03-01\nReasoning: medium<|end|>"
        "<|start|>user<|message|>Hi, wer bist <du>? <|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Let me see.<|end|>"
        '<|start|>assistant to=functions.clock<|channel|>commentary json<|message|>{"zone": "Zürich", "digits": 2}'
        '<|call|><|start|>functions.clock to=assistant<|channel|>commentary<|message|>"{\\"time\\": \\"9:00\\"}"<|end|>'
        "<|start|>assistant",
    ),
    "tokens": (
        [SYSTEM, ASK],
        "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi, wer bist <du>?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "observations": (
        [ASK, CALLS, RESULT],
        "[gMASK]<sop><|user|>\nHi, wer bist <du>? <|assistant|>\n<think></think>\n<tool_call>clock\n"
        "<arg_key>zone</arg_key>\n<arg_value>Zürich</arg_value>\n<arg_key>digits</arg_key>\n<arg_value>2</arg_value>\n"
        '</tool_call><|observation|>\n<tool_response>\n{"time": "9:00"}\n</tool_response><|assistant|>',
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_against_text_written_by_hand(name):
    messages, expected = EXPECTED[name]
    assert render(FAMILIES[name], messages) == expected


def test_what_families_refuse_is_told_in_their_words():
    for name, messages, words in (
        ("brackets", [ASK, ASK], "user and assistant speak in turn; message 2 is from user"),
        ("brackets", [ASK, {**CALLS, "tool_calls": [{**CALL, "id": "1"}]}], '"1" is no id of nine characters'),
        ("tokens", [{"role": "critic", "content": "x"}], "there is no role critic"),
    ):
        with pytest.raises(InvalidRequestError, match=f"does not take these messages: {words}"):
            render(FAMILIES[name], messages)


@pytest.mark.parametrize("given", [ARGUMENTS, '{"zone": "Zürich", "digits": 2}'], ids=["mapping", "text"])
def test_arguments_of_calls_go_into_templates_of_either_kind(given):
    """Half of the families look inside the arguments, the others put them in as text; callers have one or the other."""
    call = {**CALL, "function": {"name": "clock", "arguments": given}}
    messages = [ASK, {**CALLS, "tool_calls": [call]}, RESULT]
    for name in set(FAMILIES) - {"turns", "tokens", "bars"}:
        inside = "<arg_key>zone</arg_key>\n<arg_value>Zürich</arg_value>" if name == "observations" else (
            '{"zone": "Zürich", "digits": 2}'
        )  # fmt: skip
        assert inside in render(FAMILIES[name], messages), name
    text = render("{{ messages[1].tool_calls[0].function.arguments ~ '' }}", messages)
    assert text == str(given)
    assert call["function"]["arguments"] is given


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0] | tojson(indent=2) | indent(4) }}{{ '</script>&é\"' | tojson | tojson }}{{ none | tojson }}",
        "{{ {'b': 'é', 'a': [1.5, true]} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ messages[0] | items | list }}",
        "{{ messages[0].nope }}{{ messages[0].nope is none }}{{ messages[5] is defined }}{{ (no or 'z') ~ 3 ~ none }}",
        "{{ 'a,b'.split(',')[-1] }}{{ ' a\n'.rstrip('\n') }}{{ 'abc'[::-1] }}{{ 'aXbX'.replace('X', '-', 1) }}",
        "{{ '%s-%d' | format('a', 3) }}{{ '%5s|' % 'q' }}{{ '{} {x:,}'.format('a', x=2000) }}{{ '<a>' | e }}",
        "{% set ns = namespace(a=1, b=[]) %}{% for i in range(3) %}{% set ns.b = ns.b + [i] %}{% endfor %}{{ ns.b }}",
        "{% macro m(a, b='x') %}[{{ a ~ b ~ varargs ~ kwargs }}]{% endmacro %}{{ m(1) }}{{ m(1, 2, 3, c=4) }}",
        "{% macro w() %}<{{ caller('q') }}>{% endmacro %}{% call(x) w() %}{{ x }}!{% endcall %}",
        "{% filter upper %}abc{% endfilter %}{% set t | trim %}  multi {{ 1 }} {% endset %}[{{ t }}]",
        "{% for m in messages if m.role == 'user' %}{{ loop.index ~ loop.length }}{% else %}-{% endfor %}",
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{{ 3 is number }}{{ {} is mapping }}{{ [] is sequence }}{{ 'a' is string }}{{ 4 is divisibleby 2 }}",
        "{{ 7 // 2 }}{{ -7 % 3 }}{{ 2 ** 5 }}{{ '4' | int + 1 }}{{ 'a' ~ 'b' * 3 }}{{ [1] + [2] }}{{ 1 < 2 < 3 }}",
        "{{ ['a', none, ''] | select | list }}{{ messages | rejectattr('role', 'in', ['user']) | list | length }}",
        "{{ dict({'a': 1}, b=2) }}{{ {'a': none} }}{{ [none, true, 1e3] }}{{ 'b' in {'b': 1} }}",
        "{{- '   trimmed' -}}   \n   {{ 'kept' }}   \n    {%- if true -%}   a   {%- endif %}  b\n",
        "  {% if true %}\n  line\n  {% endif %}\n    {%+ if true %}plus{% endif %}\n\n",
        "{% for m in messages %}\n{{ m.role }}\n{% endfor %}\n",
    ],
)  # fmt: skip
def test_constructs_that_templates_use(source):
    expected = as_hugging_face(source, TALKS[3])
    assert expected is not None
    assert render(source, TALKS[3]) == expected


# ------------------------------------------------------------------------------------------------- to tokens, and back


def test_rendered_text_begins_with_one_bos_and_has_no_end_token():
    """A file may ask for an end token behind texts; behind an opened turn it would end what has not begun."""
    tokenizer = Tokenizer.from_metadata(spm_metadata(add_eos_token=True))
    assert tokenizer.encode("ab")[-1] == tokenizer.eos_id
    for text in ("ab", "<s>ab"):
        ids = tokenizer.encode_rendered(text)
        assert (ids[0], ids.count(tokenizer.bos_id), ids.count(tokenizer.eos_id)) == (tokenizer.bos_id, 1, 0)
    silent = Tokenizer.from_metadata(spm_metadata(add_bos_token=False))
    assert silent.bos_id not in silent.encode_rendered("ab")
    assert silent.encode_rendered("<s>ab").count(silent.bos_id) == 1


def test_a_bos_that_the_file_takes_for_ordinary_text():
    metadata = spm_metadata(pieces=(*SPM_PIECES, ("<bos>", -9.0)))
    bos = metadata["tokenizer.ggml.tokens"].index("<bos>")
    tokenizer = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.bos_token_id": bos})
    assert tokenizer.encode_rendered("<bos>ab") == [bos, *tokenizer.encode("ab", add_special=False)]


def test_special_tokens_by_the_names_templates_use():
    metadata = bpe_metadata(bos_token_id=0, seperator_token_id=5, mask_token_id=6, padding_token_id=7)
    metadata["tokenizer.chat_template"] = (
        "{{ bos_token }}|{{ eos_token }}|{{ sep_token }}|{{ mask_token }}|{{ x_token }}"
    )
    tokenizer = Tokenizer.from_metadata(metadata)
    expected = "|".join(tokenizer.token_text(id) for id in (0, tokenizer.eos_id, 5, 6)) + "|"
    assert ChatTemplate.from_metadata(metadata, tokenizer).render([ASK]) == expected


END_TOKENS = [
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<EOT>",
    "_<EOT>", "[EOT]", "[EOS]", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_utterance>", "<eos>",
    "<turn|>", "<|tool_response>", "</s>", "<｜end▁of▁sentence｜>", "<|ifm|im_end|>",
]  # fmt: skip


@pytest.mark.parametrize("name", END_TOKENS)
def test_names_that_end_a_turn(name):
    """Whatever the file says of their type, and beside the end token it names."""
    for where in ({"specials": ("<|x|>", name)}, {"user": (name,)}):
        tokenizer = Tokenizer.from_metadata(bpe_metadata(**{"specials": ("<|x|>",), "user": ()} | where))
        assert tokenizer.eog_ids == {tokenizer.token_id("<|x|>"), tokenizer.token_id(name)}
        assert tokenizer.decode([tokenizer.token_id(name)]) == ""


@pytest.mark.parametrize("role", ["eos", "eot", "eom"])
def test_ids_that_end_a_turn(role):
    tokenizer = Tokenizer.from_metadata(bpe_metadata(**{f"{role}_token_id": 40}))
    assert 40 in tokenizer.eog_ids


def test_listed_ids_that_end_a_turn():
    plain = Tokenizer.from_metadata(bpe_metadata())
    listed = Tokenizer.from_metadata(bpe_metadata(eos_token_ids=np.array([40, 41, 2**30])))
    assert listed.eog_ids == plain.eog_ids | {40, 41}
    for wrong in (40, ["<x>"], np.array([0.5])):
        with pytest.raises(TokenizerError, match="eos_token_ids"):
            Tokenizer.from_metadata(bpe_metadata(eos_token_ids=wrong))


@pytest.mark.parametrize("name", ["<|im_end|>", "<end_of_turn>", "named by its id"])
def test_an_answer_ends_with_its_turn(tmp_path, name):
    """The whole way: template, prompt, tokens; what ends the turn is no part of the answer."""
    metadata = bpe_tokenizer(280) | {"tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    end = metadata["tokenizer.ggml.tokens"].index("<unused2>")
    if name.startswith("<"):
        metadata["tokenizer.ggml.tokens"][end] = name
    else:
        metadata["tokenizer.ggml.eot_token_id"] = end
    path = tmp_path / "tiny.gguf"
    tiny_llama(path, vocab=280, metadata=metadata)
    with LLM(path, device="cpu", threads=1, max_sequences=1) as llm:
        letter = llm.tokenizer.token_id("q")
        ends = SamplingParams(max_tokens=5, temperature=0, logit_bias={end: 1e5})
        result = llm.chat([ASK], ends)
        assert (result.text, result.token_ids, result.finish_reason) == ("", [end], "stop")
        talks_on = SamplingParams(max_tokens=5, temperature=0, logit_bias={letter: 1e5})
        assert llm.chat([ASK], talks_on).text == "qqqqq"
