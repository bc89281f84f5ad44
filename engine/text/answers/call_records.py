"""One record for each family's way to write calls.

A record is chosen by what the chat template writes for a probe (call_forms.py), so a new model of a known family needs
no entry. What models write is read in tool_calls.py; these records are what constraints force.
"""

from dataclasses import replace

from engine.text.answers.call_form import CallForm, Tree

_JSON = '{"name": "$name", "arguments": $arguments}'
_XML = "\n<function=$name>\n$arguments</function>\n"
_DSML = '\n<｜DSML｜invoke name="$name">\n$arguments</｜DSML｜invoke>'
_COHERE = '{"tool_call_id": "$index", "tool_name": "$name", "parameters": $arguments}'


_KIMI = '<|open|>argument key="$key" type="$type"<|sep|>$value<|close|>argument<|sep|>'
_ATEM = '<atem:function_calls>\n<atem:invoke name="$name">\n$arguments</atem:invoke>\n</atem:function_calls>'
_NS = "]<]minimax[>["


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
        body="<|message|>",
    ),
    CallForm(
        "muse",
        " to=",
        f"$name<|message|>{_ATEM}",
        between="<|eom|><|start|>assistant to=",
        parameter='<atem:parameter name="$key">$value</atem:parameter>\n',
        opens="<|start|>",
        thought=(" to=self<|message|>", "<|eom|><|start|>assistant"),
        body="<|message|>",
    ),
    CallForm("functionary-v3.2", "", "$name\n$arguments", between=">>>", opens=">>>", body="\n"),
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
        "ling-3.0",
        "<tool_call>",
        "$name\n$arguments\n",
        "</tool_call>",
        parameter="<arg_key>$key</arg_key>\n<arg_value>$value</arg_value>",
    ),
    CallForm(
        "hunyuan-v3",
        "<tool_calls:opensource>",
        "<tool_call:opensource>$name<tool_sep:opensource>\n$arguments</tool_call:opensource>",
        "</tool_calls:opensource>",
        between="\n",
        around=("\n", "\n"),
        parameter="<arg_key:opensource>$key</arg_key:opensource>\n"
        "<arg_value:opensource>$value</arg_value:opensource>\n",
    ),
    CallForm(
        "kimi-k2",
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>functions.$name:$index<|tool_call_argument_begin|>$arguments<|tool_call_end|>",
        "<|tool_calls_section_end|>",
        between="",
        id="functions.$name:$index",
    ),
    CallForm(
        "kimi-k3",
        "<|open|>tools<|sep|>",
        '<|open|>call tool="$name" index="$index"<|sep|>$arguments<|close|>call<|sep|>',
        "<|close|>tools<|sep|>",
        between="",
        parameter=_KIMI,
        lead="<|open|>response<|sep|><|close|>response<|sep|>",
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
    CallForm(
        "minimax-m3",
        f"{_NS}<tool_call>",
        f'{_NS}<invoke name="$name">$arguments{_NS}</invoke>\n',
        f"{_NS}</tool_call>",
        between="",
        around=("\n", ""),
        parameter=f"{_NS}<$key>$value{_NS}</$key>",
        tree=Tree(("", ""), f"{_NS}<$key>$value{_NS}</$key>", f"{_NS}<item>$value{_NS}</item>"),
    ),
    CallForm(
        "gemma-4",
        "<|tool_call>",
        "call:$name{$arguments}",
        "<tool_call|>",
        parameter="$key:$value",
        separator=",",
        tree=Tree(('<|"|>', '<|"|>'), "$key:$value", "$value", ",", ("{", "}"), ("[", "]")),
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
        id="$index",
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
