"""Models that say calls in the notation of their family: whole, streamed, and cut off by max_tokens anywhere."""

import json

import pytest

from engine import LLM, SamplingParams
from engine.text.answers.call_records import BY_NAME
from tests.support.chats.form_templates import template_of
from tests.support.chats.round_trip import TOOLS
from tests.support.models.scripted_model import in_pieces, scripted_llama

TALK = [{"role": "user", "content": "Hello"}]
QUERY = 'ü "so" <b> 日本'
MORE = {"tags": ["a]", "}"]}
JSON = json.dumps({"query": QUERY, "number": 7, "more": MORE}, ensure_ascii=False)
CONTROL = ("[TOOL_CALLS]", "[ARGS]", "<|tool_call>", "<tool_call|>")
BEFORE = "<think>\nHm, <tool_call> it is.\n</think>\n\nI look.\n"
ALL = {"query": QUERY, "number": 7, "more": MORE}
ONE = {"query": QUERY}
SCRIPTS = {
    "hermes": (
        in_pieces(f'{BEFORE}<tool_call>\n{{"name": "look_up", "arguments": {JSON}}}\n</tool_call>'),
        ALL,
    ),
    "llama3": (in_pieces(f'{{"name": "look_up", "parameters": {JSON}}}'), ALL),
    "mistral-v11": (in_pieces(f"[TOOL_CALLS]look_up[ARGS]{JSON}", CONTROL), ALL),
    "qwen3-coder": (
        ["<tool_", "call>\n<function=", "look_up>\n<parameter=", "query>\n", 'ü "so" ', "<b> ", "日本", "\n</",
         "parameter>\n", "</function>\n</tool_call>"],
        ONE,
    ),
    "gemma-4": (
        ["<|tool_call>", "call:look_up{", "query:<|", '"|>ü "so"', " <b> ", "日本<", '|"|>}', "<tool_call|>"],
        ONE,
    ),
}  # fmt: skip


def added_up(chunks):
    """Text, reasoning and calls of a stream, these from their parts."""
    calls = {}
    for part in (part for chunk in chunks for part in chunk.call_parts):
        name, arguments = calls.get(part.index, (part.name, ""))
        calls[part.index] = (name, arguments + part.arguments)
    return "".join(c.text for c in chunks), "".join(c.reasoning for c in chunks), list(calls.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_call_whole_and_cut_off(tmp_path, name):
    script, arguments = SCRIPTS[name]
    template = template_of(BY_NAME[name])
    path = scripted_llama(tmp_path / "m.gguf", script, control=CONTROL, template=template, own=True)
    with LLM(path, device="cpu", threads=1, max_sequences=1) as llm:

        def ask(max_tokens):
            params = SamplingParams(temperature=0, max_tokens=max_tokens)
            stream = llm.stream_chat(TALK, params, tools=TOOLS)
            chunks, result = list(stream), stream.result()
            assert added_up(chunks) == (
                result.text, result.reasoning, [(one.name, one.arguments) for one in result.tool_calls]
            )  # fmt: skip
            assert chunks[-1].finish_reason == result.finish_reason
            return result, chunks

        whole, chunks = ask(len(script) + 1)
        asked = llm.chat(TALK, SamplingParams(temperature=0, max_tokens=len(script) + 1), tools=TOOLS)
        assert (asked.text, asked.reasoning) == (whole.text, whole.reasoning)
        assert [one.arguments for one in asked.tool_calls] == [one.arguments for one in whole.tool_calls]
        ((one,), reason) = whole.tool_calls, whole.finish_reason
        assert (one.name, json.loads(one.arguments), reason) == ("look_up", arguments, "stop")
        if name == "hermes":
            assert (whole.text, whole.reasoning) == ("I look.", "Hm, <tool_call> it is.")
        if name != "gemma-4":
            assert sum(len(chunk.call_parts) for chunk in chunks) > 3
        for n in range(1, len(script)):
            cut, _ = ask(n)
            assert cut.finish_reason == "length", n
            for made in cut.tool_calls:
                assert made.name == "look_up"
                assert one.arguments.startswith(made.arguments.rstrip("}")), n


def test_a_call_has_one_id_however_often_its_answer_is_read(tmp_path):
    script, _ = SCRIPTS["hermes"]
    path = scripted_llama(tmp_path / "m.gguf", script, template=template_of(BY_NAME["hermes"]), own=True)
    with LLM(path, device="cpu", threads=1, max_sequences=1) as llm:
        ids = set()
        for _ in range(2):
            stream = llm.stream_chat(TALK, SamplingParams(temperature=0, max_tokens=len(script) + 1), tools=TOOLS)
            parts = [part for chunk in stream for part in chunk.call_parts]
            assert stream.result().tool_calls[0].id == parts[0].id
            ids.add(parts[0].id)
        assert len(ids) == 2


def test_a_call_in_the_wrong_notation_is_text_or_a_whole_call(tmp_path):
    """What the constraint cannot follow from its marker on is read as what it is when it is whole."""
    wrong = "<tool_call>\nlook_up: what?\n</tool_call> so"
    path = scripted_llama(tmp_path / "m.gguf", [wrong], template=template_of(BY_NAME["hermes"]))
    with LLM(path, device="cpu", threads=1, max_sequences=1) as llm:
        result = llm.chat(TALK, SamplingParams(temperature=0, max_tokens=9), tools=TOOLS)
    assert (result.text, result.tool_calls) == (wrong, ())
