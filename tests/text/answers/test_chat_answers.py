"""Answers with structure: taken apart into text, reasoning and calls, and back into the next turn's prompt."""

import json
import logging
from dataclasses import replace

import pytest

from engine import LLM, InvalidRequestError, SamplingParams
from engine.cli.options.variables import parse_variables
from engine.text import ChatTemplate
from engine.text.answers.formats import PLAIN, choose_format
from engine.text.answers.parser import AnswerParser
from engine.text.answers.thoughts import ReasoningFormat
from engine.text.answers.tool_calls import parameter_types, read_calls
from tests.support.chats.chat_families import FAMILIES
from tests.support.command_line import run
from tests.support.models.scripted_model import END, scripted_llama

GREEDY = SamplingParams(temperature=0, max_tokens=60)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "clock",
            "parameters": {"type": "object", "properties": {"zone": {"type": "string"}, "n": {"type": "integer"}}},
        },
    }
]


def apart(markers, raw, prompt="", size=1, types=None):
    """Text, reasoning and calls of an answer that comes in pieces of a size."""
    parser = AnswerParser(markers, prompt, types)
    pieces = [parser.push(raw[start : start + size]) for start in range(0, len(raw), size)] + [parser.finish()]
    calls = [(call.name, json.loads(call.arguments)) for piece in pieces for call in piece.tool_calls]
    return "".join(p.content for p in pieces), "".join(p.reasoning for p in pieces), calls


CLOCK = [("clock", {"zone": "Bern", "n": 2})]
JSON = '{"zone": "Bern", "n": 2}'
CALL = f'{{"name": "clock", "arguments": {JSON}}}'
XML = "<function=clock>\n<parameter=zone>\nBern\n</parameter>\n<parameter=n>\n2\n</parameter>\n</function>"
INVOKE = '<invoke name="clock">\n<parameter name="zone">Bern</parameter>\n<parameter name="n">2</parameter>\n</invoke>'
KEYS = "clock\n<arg_key>zone</arg_key>\n<arg_value>Bern</arg_value>\n<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n"
HARMONY = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
ANSWERS = [
    # what the template mentions, the end of the prompt, the answer, (text, reasoning, calls)
    ("<think></think>", "", "<think>\nHm.\n</think>\n\nSo it is.\n", ("So it is.\n", "Hm.", [])),
    ("<think></think>", "assistant\n<think>\n", "Hm.\n\nYes\n</think>\n\nSo.", ("So.", "Hm.\n\nYes", [])),
    ("<think></think>", "assistant\n<think>\n\n</think>\n\n", "So.", ("So.", "", [])),
    ("<think></think>", "", "</think>So.", ("So.", "", [])),
    ("<think></think>", "", "  a < b, <thinker>, 2 </ 3 <thi", ("  a < b, <thinker>, 2 </ 3 <thi", "", [])),
    ("<think></think>", "", "<think>cut sho", ("", "cut sho", [])),
    ("[THINK][/THINK]", "[/INST]", "[THINK]Hm.[/THINK]So.", ("So.", "Hm.", [])),
    ("<seed:think></seed:think>", "", "<seed:think>Hm.</seed:think>\nSo.", ("So.", "Hm.", [])),
    ("'<|channel>thought'", "", "<|channel>thought\nHm.\n<channel|>So.", ("So.", "Hm.", [])),
    ("<|START_THINKING|>", "", "<|START_THINKING|>Hm.<|END_THINKING|>So.", ("So.", "Hm.", [])),
    (
        "<|START_THINKING|><|START_RESPONSE|>",
        "<|START_THINKING|>",
        "Hm.<|END_THINKING|><|START_RESPONSE|>So.<|END_RESPONSE|>",
        ("So.", "Hm.", []),
    ),
    (
        "[BEGIN FINAL RESPONSE]",
        "Here are my reasoning steps:\n",
        "Hm.\n[BEGIN FINAL RESPONSE]\nSo.",
        ("So.", "Hm.", []),
    ),
    ("◁think▷", "", "◁think▷Hm.◁/think▷So.", ("So.", "Hm.", [])),
    (
        "<tool_call><think>",
        "",
        f"<think>Hm.</think>I look.\n<tool_call>\n{CALL}\n</tool_call>",
        ("I look.", "Hm.", CLOCK),
    ),
    ("<tool_call>", "", f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", ("", "", CLOCK * 2)),
    ("<tool_call>", "", f"<tool_call>{CALL}", ("", "", CLOCK)),
    ("<tool_call>", "", "<tool_call>no call</tool_call> at all", ("<tool_call>no call</tool_call> at all", "", [])),
    ("<tool_call>", "", f"<tool_call>\n{XML}\n</tool_call>", ("", "", CLOCK)),
    ("<tool_call>", "", f"<tool_call>{KEYS}</tool_call>", ("", "", CLOCK)),
    ("<tool_call><function=", "", f"I look.\n{XML}", ("I look.", "", CLOCK)),
    ("<function=", "", f"<function=clock>{JSON}</function>", ("", "", CLOCK)),
    ("<minimax:tool_call>", "", f"<minimax:tool_call>\n{INVOKE}\n</minimax:tool_call>", ("", "", CLOCK)),
    ("<tool_calls>", "", f"<tool_calls>[{CALL}, {CALL}]</tool_calls>", ("", "", CLOCK * 2)),
    ("<tool_calls>", "", f"<tool_calls>\n{CALL}\n{CALL}\n</tool_calls>", ("", "", CLOCK * 2)),
    ("[TOOL_CALLS]", "", f"[TOOL_CALLS] [{CALL}]", ("", "", CLOCK)),
    ("[TOOL_CALLS]", "", f"Look:[TOOL_CALLS]clock[ARGS]{JSON}[TOOL_CALLS]clock[ARGS]{JSON}", ("Look:", "", CLOCK * 2)),
    ("[TOOL_CALLS]", "", f"[TOOL_CALLS]clock[CALL_ID]123456789[ARGS]{JSON}", ("", "", CLOCK)),
    ("<|python_tag|>", "", f'<|python_tag|>{{"name": "clock", "parameters": {JSON}}}', ("", "", CLOCK)),
    (
        "<|tool_call_start|>",
        "",
        "<|tool_call_start|>[clock(zone='Bern', n=2)]<|tool_call_end|>So.",
        ("So.", "", CLOCK),
    ),
    ("<|tool_call>", "", '<|tool_call>call:clock{n:2,zone:<|"|>Bern<|"|>}<tool_call|>', ("", "", CLOCK)),
    (
        "<|tool_calls_section_begin|>",
        "",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.clock:0<|tool_call_argument_begin|>"
        f"{JSON}<|tool_call_end|><|tool_calls_section_end|>",
        ("", "", CLOCK),
    ),
    (
        "<｜tool▁calls▁begin｜>",
        "",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n"
        f"{JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("", "", CLOCK),
    ),
    (
        "<｜tool▁calls▁begin｜>",
        "",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("", "", CLOCK),
    ),
    (
        "<|START_ACTION|>",
        "",
        f'<|START_ACTION|>[\n {{"tool_call_id": "0", "tool_name": "clock", "parameters": {JSON}}}\n]<|END_ACTION|>',
        ("", "", CLOCK),
    ),
    (
        "<|channel|>analysis<|message|>",
        HARMONY,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>So.",
        ("So.", "Hm.", []),
    ),
    (
        "<|channel|>analysis<|message|>",
        HARMONY,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        f"<|start|>assistant<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{JSON}",
        ("I look.", "Hm.", CLOCK),
    ),
    (
        "<|channel|>analysis<|message|>",
        HARMONY,
        f" to=functions.clock<|channel|>commentary json<|message|>{JSON}",
        ("", "", CLOCK),
    ),
    (
        "<|channel|>analysis<|message|>",
        HARMONY,
        "Just text, assistant or not.",
        ("Just text, assistant or not.", "", []),
    ),
    ("<|channel|>analysis<|message|>", HARMONY, "<|channel|>analysis<|message|>cut sho", ("", "cut sho", [])),
    (
        "<|begin|>assistant<|think|>",
        "<|begin|>assistant",
        "<|think|>Hm.<|end|><|begin|>assistant<|tool_calls|><|tool_call:begin|>a<|tool_call:name|>clock"
        f"<|tool_call:args|>{JSON}<|tool_call:end|>",
        ("", "Hm.", CLOCK),
    ),
    (">>>all\n", ">>>", f"all\nI look.\n>>>clock\n{JSON}", ("I look.", "", CLOCK)),
]


@pytest.mark.parametrize(("mentioned", "prompt", "raw", "expected"), ANSWERS)
def test_an_answer_is_taken_apart_however_it_is_cut(mentioned, prompt, raw, expected):
    markers = choose_format(mentioned)
    for size in (1, 2, 3, 7, len(raw)):
        assert apart(markers, raw, prompt, size) == expected, size


def test_a_template_without_structure_has_plain_answers():
    assert choose_format(FAMILIES["bars"]) == PLAIN


def test_markers_of_a_template_s_own_are_found_around_its_probes():
    source = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.reasoning_content %}<musing>\n{{ m.reasoning_content }}\n</musing>{% endif %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}<request>{{ {'name': c.function.name, 'arguments': "
        "c.function.arguments} | tojson }}</request>{% endfor %}{% endfor %}"
    )
    markers = ChatTemplate(source).answer_format()
    raw = f"<musing>\nHm.\n</musing>I look.<request>{CALL}</request>"
    assert apart(markers, raw) == ("I look.", "Hm.", CLOCK)


def test_calls_without_a_marker_are_read_where_tools_are_given():
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ {'name': c.function.name, 'parameters': c.function.arguments} | tojson }}{% endfor %}{% endfor %}"
    )
    template = ChatTemplate(source)
    raw = f'{{"name": "clock", "parameters": {JSON}}}'
    assert apart(template.answer_format(tools=TOOLS), raw) == ("", "", CLOCK)
    assert apart(template.answer_format(tools=TOOLS), '{"name": "Ann"}') == ('{"name": "Ann"}', "", [])
    assert apart(template.answer_format(), raw) == (raw, "", [])


def test_a_call_between_markers_without_meaning_is_a_call():
    markers = replace(choose_format("<|python_start|>"), bare_calls=frozenset({"clock"}))
    raw = f'<|python_start|>{{"name": "clock", "parameters": {JSON}}}<|python_end|>'
    for size in (1, 4, 100):
        assert apart(markers, raw, size=size) == ("", "", CLOCK)


def test_values_without_quotes_have_the_types_of_the_schema():
    written = "<function=clock><parameter=zone>12</parameter><parameter=n>12</parameter></function>"
    call = read_calls(written, parameter_types(TOOLS))[0]
    assert json.loads(call.arguments) == {"zone": "12", "n": 12}


# -------------------------------------------------------------------------------------------- from turn to turn

STRICT = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
  {%- if '<|channel|>' in m.content -%}{{ raise_exception('channel tokens in the content') }}{%- endif -%}
  {%- if m.thinking -%}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif -%}
  {%- if m.tool_calls -%}
    {{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' }}
    {{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
  {%- else -%}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif -%}
{%- elif m.role == 'tool' -%}{{ '<|start|>functions.f to=assistant<|message|>' + m.content + '<|end|>' }}
{%- else -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif -%}
{%- endfor -%}{{ '<|start|>assistant' if add_generation_prompt }}"""
CHANNEL_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
THINK = """{%- for m in messages -%}
<{{ m.role }}>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- if '<think>' in (m.content or '') or '<tool_call>' in (m.content or '') %}{{ raise_exception('raw') }}{% endif %}
{{- m.content }}
{%- for c in m.tool_calls or [] %}
{{- '<tool_call>{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + '}</tool_call>' }}
{%- endfor %}
{%- endfor -%}{{ '<assistant>' if add_generation_prompt }}"""
SPLIT = [
    "<|channel|>", "analysis<|message|>", "Hm", ".<|end|><|start|>assist", "ant<|channel|>final<|mess", "age|>So",
    " be it.",
]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "control", "template", "expected", "second"),
    [
        (
            SPLIT, CHANNEL_TOKENS, STRICT, ("So be it.", "Hm."),
            "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>So be it.<|end|>",
        ),
        (
            ["<think>", "\nHm.\n", "</think>", "\n\nSo be", " it."], ("<think>", "</think>"), THINK,
            ("So be it.", "Hm."), "<assistant><think>Hm.</think>So be it.",
        ),
        (
            ["<think>", "\nHm.\n", "</think>", "\n\nSo be", " it."], (), THINK,
            ("So be it.", "Hm."), "<assistant><think>Hm.</think>So be it.",
        ),
        (
            ["I look.", "<tool_call>", '\n{"name": "f", "argu', 'ments": {"x": 1}}\n', "</tool_call>"],
            ("<tool_call>", "</tool_call>"), THINK, ("I look.", ""),
            '<assistant>I look.<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>',
        ),
    ],
    ids=["channels", "think tokens", "think words", "calls"],
)  # fmt: skip
def test_an_answer_goes_into_the_next_turn(tmp_path, answer, control, template, expected, second):
    path = scripted_llama(tmp_path / "m.gguf", answer, control=control, template=template)
    talk = [{"role": "user", "content": "Hi"}]
    with LLM(path, device="cpu", threads=1, max_sequences=1) as llm:
        result = llm.chat(talk, GREEDY)
        assert (result.text, result.reasoning) == expected
        chunks = list(llm.stream_chat(talk, GREEDY))
        assert ("".join(c.text for c in chunks), "".join(c.reasoning for c in chunks)) == expected
        assert [call.name for c in chunks for call in c.tool_calls] == [call.name for call in result.tool_calls]
        talk += [result.as_message(), {"role": "user", "content": "And?"}]
        prompt = llm.tokenizer.decode(llm.render_chat(talk), skip_special=False)
        assert second in prompt
    said = run("chat", "-m", path, "--temp", 0, "--device", "cpu", stdin="Hi\nAnd?\n").stdout
    for marker in ("<|", "<think>", "<tool_call>"):
        assert marker not in said
    assert said.count(expected[0]) == 2
    assert said.count(f"--- thinking\n{expected[1]}\n--- answer\n") == (2 if expected[1] else 0)
    assert said.count('--- call f {"x": 1}\n') == 2 * len(result.tool_calls)


def test_a_raw_answer_with_channels_is_taken_apart_on_its_way_back():
    raw = "".join(SPLIT)
    text = ChatTemplate(STRICT).render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": raw}])
    assert "<|channel|>final<|message|>So be it.<|end|>" in text


def test_calls_go_back_as_text_where_the_template_reads_none(tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{# <tool_call> #}"
    answer = ["I look.", f"<tool_call>{CALL}</tool_call>"]
    path = scripted_llama(tmp_path / "m.gguf", answer, template=template)
    with LLM(path, device="cpu", threads=1, max_sequences=1) as llm:
        result = llm.chat([{"role": "user", "content": "Hi"}], GREEDY)
        assert [call.name for call in result.tool_calls] == ["clock"]
        assert result.as_message() == {"role": "assistant", "content": "\n".join(answer)}


def test_the_user_can_give_the_result_of_a_call(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'user' and not loop.first and messages[loop.index0 - 1].tool_calls %}"
        "{{ raise_exception('a call has no result') }}{% endif %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}{{ c.function.arguments }}</tool_call>"
        "{% endfor %}{% endfor %}"
    )
    path = scripted_llama(tmp_path / "m.gguf", [f"<tool_call>{CALL}</tool_call>"], template=template)
    done = run("chat", "-m", path, "--temp", 0, "--device", "cpu", stdin="/tool 1\nHi\n/tool nine\nHi\nHi\n")
    assert done.stdout.count("--- call clock") == 4  # the last line came without a result, and was taken all the same
    assert done.stderr.count("no call is waiting") == 1


# ------------------------------------------------------------------------------------- variables and stop strings

ECHO = "{% for m in messages %}{{ m.content }}{% endfor %}[{{ style }}{% if thinks %}+{% endif %}]"


def test_values_of_variables():
    entries = ["a=TRUE", "b=False", "c=none", "d=null", "e=NaN", "f=-Infinity", "g=[1, null]", "h=", "i= 2 ", "j='x'"]
    values = [True, False, "none", None, "NaN", "-Infinity", [1, None], "", 2, "'x'"]
    assert list(parse_variables(entries).values()) == values


def test_variables_of_the_template(tmp_path):
    path = scripted_llama(tmp_path / "m.gguf", ["ok"], template=ECHO)
    options = ["-m", path, "--temp", 0, "--device", "cpu"]
    for value, shown in (("true", "+"), ("false", ""), ("False", ""), ("0", ""), ('"no"', "+"), ("None", "")):
        given = ["--chat-var", f"thinks={value}", "--chat-var", "style=a=b"]
        made = json.loads(run("generate", "Hi", *options, *given, "--json").stdout)
        with LLM(path, device="cpu", threads=1, max_sequences=1) as llm:
            assert llm.tokenizer.decode(made["prompt_token_ids"]) == f"Hi[a=b{shown}]"
        assert (made["text"], made["reasoning"], made["tool_calls"]) == ("ok", "", [])
        assert "ok" in run("chat", *options, *given, stdin="Hi\n").stdout
    for wrong in ("thinks", "=1", "a b=1", "messages=[]"):
        for command in (["generate", "Hi"], ["chat"]):
            assert "--chat-var" in run(*command, *options, "--chat-var", wrong, status=2).stderr
    assert "--no-chat" in run("generate", "Hi", *options, "--no-chat", "--chat-var", "a=1", status=2).stderr


WORDS = ["one ", "two ", "<|stop|>", "three ", "<|go|>", "four"]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["<|stop|>"], "one two "),
        (["two <|stop|>"], "one "),
        (["<|stop|>three"], "one two "),
        (["<|stop|>three <|go|>"], "one two "),
        (["<|stop|><|go|>"], "one two three four"),
        (["<|go|>", "four"], "one two three "),
        (["<|none|>"], "one two three four"),
        (["three <|go|>four!", "e <|"], "one two three four"),
        ([END], "one two three four"),
    ],
)
def test_stop_strings_that_name_control_tokens(tmp_path, stop, text):
    path = scripted_llama(tmp_path / "m.gguf", WORDS, control=("<|stop|>", "<|go|>"))
    with LLM(path, device="cpu", threads=1, max_sequences=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=20, stop=stop)
        result = llm.generate("Hi", params)
        assert (result.text, result.finish_reason) == (text, "stop")
        assert "".join(chunk.text for chunk in llm.stream("Hi", params)) == text
    given = [word for one in stop for word in ("--stop", one)]
    assert run("generate", "Hi", "-m", path, "--temp", 0, "--device", "cpu", *given).stdout == f"{text}\n"


def test_a_stop_string_ends_the_text_where_end_tokens_are_ignored(tmp_path):
    path = scripted_llama(tmp_path / "m.gguf", ["one"])
    with LLM(path, device="cpu", threads=1, max_sequences=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, stop=[END])
        result = llm.generate("Hi", params)
        assert (result.text, result.finish_reason, len(result.token_ids)) == ("one", "stop", 2)


def test_stop_token_ids(tmp_path):
    path = scripted_llama(tmp_path / "m.gguf", WORDS, template=ECHO)
    with LLM(path, device="cpu", threads=1, max_sequences=1) as llm:
        two = llm.generate("Hi", GREEDY).token_ids[1]
    options = ["-m", path, "--temp", 0, "--device", "cpu", "--stop-token-id"]
    assert run("generate", "Hi", *options, two).stdout == "one \n"
    assert run("chat", *options, two, stdin="Hi\n").stdout == "one \n"
    assert "stop_token_ids" in run("generate", "Hi", *options, 10**6, status=2).stderr


def test_a_prompt_that_begins_with_bos_has_one(tmp_path, caplog):
    metadata = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": True}
    path = scripted_llama(tmp_path / "m.gguf", ["one"], control=("<|bos|>",))
    with LLM(path, device="cpu", threads=1, max_sequences=1) as llm:
        metadata["tokenizer.ggml.bos_token_id"] = bos = llm.tokenizer.token_id("<|bos|>")
        plain = llm.prompt_ids("Hi")
        assert llm.prompt_ids("<|bos|>Hi") == [bos, *plain]  # this model asks for none: as it is written
    scripted_llama(path, ["one"], control=("<|bos|>",), metadata=metadata)
    with LLM(path, device="cpu", threads=1, max_sequences=1) as llm, caplog.at_level(logging.WARNING):
        assert llm.prompt_ids("Hi") == [bos, *plain]
        assert not caplog.records
        assert llm.prompt_ids("<|bos|>Hi") == [bos, *plain]
        assert "begins with <|bos|>" in caplog.text
        assert llm.prompt_ids([bos, bos]) == [bos, bos]


# --------------------------------------------------------------------------------------------- where thoughts go

THOUGHTS = [
    # format, (text, reasoning) where the model opens its thought, where the prompt has opened it
    ("auto", ("So.", "Hm."), ("So.", "Hm.")),
    ("deepseek", ("So.", "Hm."), ("So.", "Hm.")),
    ("none", ("<think>\nHm.\n</think>\n\nSo.", ""), ("Hm.\n</think>\n\nSo.", "")),
    ("deepseek-legacy", ("<think>\nHm.\n</think>\n\nSo.", "Hm."), ("<think>Hm.\n</think>\n\nSo.", "Hm.")),
]


@pytest.mark.parametrize(("name", "begun", "opened"), THOUGHTS)
def test_where_thoughts_go(name, begun, opened):
    markers = choose_format("<think></think><tool_call>")
    for raw, prompt, expected in (
        ("<think>\nHm.\n</think>\n\nSo.", "", begun),
        ("Hm.\n</think>\n\nSo.", "<think>\n", opened),
    ):
        for size in (1, 3, 100):
            parser = AnswerParser(markers, prompt, thoughts=ReasoningFormat.parse(name))
            pieces = [parser.push(raw[at : at + size]) for at in range(0, len(raw), size)] + [parser.finish()]
            assert ("".join(p.content for p in pieces), "".join(p.reasoning for p in pieces)) == expected


@pytest.mark.parametrize("name", ["auto", "none"])
def test_calls_behind_thoughts_are_calls_wherever_the_thoughts_go(name):
    parser = AnswerParser(choose_format("<think></think><tool_call>"), thoughts=ReasoningFormat.parse(name))
    piece = parser.push(f"<think>Hm <tool_call> hm</think>\n<tool_call>\n{CALL}\n</tool_call>")
    assert [call.name for call in piece.tool_calls] == ["clock"]
    assert piece.content == ("<think>Hm <tool_call> hm</think>" if name == "none" else "")


def test_where_thoughts_go_on_the_command_line(tmp_path):
    script = ["<think>", "\nHm.\n", "</think>", "\n\nSo be", " it."]
    path = scripted_llama(tmp_path / "m.gguf", script, control=("<think>", "</think>"), template=THINK)
    options = ["-m", path, "--temp", 0, "--device", "cpu", "--chat", "--reasoning-format"]
    assert run("generate", "Hi", *options, "none").stdout == "<think>\nHm.\n</think>\n\nSo be it.\n"
    assert "--- thinking\nHm." in run("generate", "Hi", *options, "deepseek").stdout
    assert "allowed: auto" in run("generate", "Hi", *options, "no", status=2).stderr


def test_channels_go_into_the_text():
    parser = AnswerParser(
        choose_format("<|channel|>analysis<|message|>"), HARMONY, thoughts=ReasoningFormat.parse("none")
    )
    raw = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>So."
    pieces = parser.push(raw), parser.finish()
    assert "".join(piece.content for piece in pieces).replace("\n", "") == "<|channel|>analysis<|message|>Hm.<|end|>So."


def test_an_effort_is_a_number_of_tokens_where_the_template_does_not_read_it(tmp_path):
    answer = ["<think>", *(f"hm{number} " for number in range(300)), "</think>", "So."]
    path = scripted_llama(tmp_path / "m.gguf", answer, control=("<think>", "</think>"), template=THINK)
    with LLM(path, device="cpu", threads=1, max_sequences=1) as llm:
        talk, params = [{"role": "user", "content": "Hi"}], SamplingParams(temperature=0, max_tokens=320)
        assert llm.chat(talk, params).reasoning.count("hm") == 300
        assert llm.chat(talk, params, reasoning_effort="low").reasoning.count("hm") == 300
        short = llm.chat(talk, params, reasoning_effort="minimal")
        assert short.reasoning.count("hm") == 256
        assert llm.chat(talk, params, reasoning_effort="none").reasoning == ""
        assert llm.chat(talk, params, reasoning_effort="minimal", max_reasoning_tokens=7).reasoning.count("hm") == 7
        whole = llm.chat(talk, params, reasoning_format="none", max_reasoning_tokens=2)
        assert whole.text.startswith("<think>hm0 hm1 ")
        with pytest.raises(InvalidRequestError, match="allowed: auto, deepseek, none, deepseek-legacy"):
            llm.chat(talk, params, reasoning_format="some")
    reads = THINK + "{# reasoning_effort #}{% if reasoning_effort %}{% endif %}"
    assert ChatTemplate(reads).reads("reasoning_effort")
    assert not ChatTemplate(THINK + "{# reasoning_effort #}").reads("reasoning_effort")
