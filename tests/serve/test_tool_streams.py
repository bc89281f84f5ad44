"""Calls over HTTP while they are written, by a model of known words: what each API streams adds up to the whole."""

import json

import openai
import pytest

from engine.serve.models.model_store import ModelSpec
from engine.text.answers.call_records import BY_NAME
from tests.support.chats.form_templates import template_of
from tests.support.chats.round_trip import TOOLS
from tests.support.models.scripted_model import in_pieces, scripted_llama
from tests.support.servers.http_server import running

CHAT = [{"role": "user", "content": "Hello"}]
ARGUMENTS = {"query": 'ü "so" <b> 日本, and far more words than one token holds', "number": 7}
WRITTEN = json.dumps(ARGUMENTS, ensure_ascii=False)
RAW = f'<think>\nHm, so.\n</think>\n\nI look.\n<tool_call>\n{{"name": "look_up", "arguments": {WRITTEN}}}\n</tool_call>'
FUNCTION = TOOLS[0]["function"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = scripted_llama(
        tmp_path_factory.mktemp("model") / "m.gguf", in_pieces(RAW), template=template_of(BY_NAME["hermes"]), own=True
    )
    spec = ModelSpec("m", str(path), (), {"device": "cpu", "threads": 1, "max_sequences": 2})
    with running([spec], sampling={"temperature": 0}) as one:
        yield one


def test_chat_completions(client):
    options = {"model": "m", "messages": CHAT, "tools": TOOLS, "logprobs": True}
    message = client.chat.completions.create(**options).choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("I look.", "Hm, so.", "Hm, so.")
    assert [call.function.arguments for call in message.tool_calls] == [WRITTEN]
    parts, reasons = [], []
    for chunk in client.chat.completions.create(**options, stream=True):
        parts += chunk.choices[0].delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
    assert (parts[0].index, parts[0].function.name, parts[0].function.arguments) == (0, "look_up", "")
    assert parts[0].id
    assert all(part.id is None and part.index == 0 for part in parts[1:])
    assert "".join(part.function.arguments for part in parts) == WRITTEN
    assert len(parts) > 6, "token by token, and not when the call is whole"
    assert reasons[-1] == "tool_calls"


def test_the_other_vendors_messages(anthropic_client):
    tools = [{"name": "look_up", "input_schema": FUNCTION["parameters"]}]
    options = {"model": "m", "max_tokens": 300, "messages": CHAT, "tools": tools}
    whole = anthropic_client.messages.create(**options)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    assert whole.content[2].input == ARGUMENTS
    written, open_blocks = "", []
    with anthropic_client.messages.stream(**options) as stream:
        for event in stream:
            if event.type == "content_block_start":
                assert not open_blocks
                open_blocks.append(event.index)
            elif event.type == "content_block_stop":
                assert open_blocks.pop() == event.index
            elif event.type == "content_block_delta" and event.delta.type == "input_json_delta":
                assert open_blocks == [event.index] == [2]
                written += event.delta.partial_json
        last = stream.get_final_message()
    assert written == WRITTEN
    assert [block.type for block in last.content] == ["thinking", "text", "tool_use"]
    assert (last.content[2].input, last.stop_reason) == (ARGUMENTS, "tool_use")


def test_responses(client):
    tools = [{"type": "function", "name": "look_up", "parameters": FUNCTION["parameters"], "strict": False}]
    with client.responses.stream(model="m", input=CHAT, tools=tools) as events:
        kinds = [(event.type, getattr(event, "output_index", None)) for event in events]
        answer = events.get_final_response()
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    assert answer.output[2].arguments == WRITTEN
    assert 0 < answer.usage.output_tokens_details.reasoning_tokens < 10
    added = [place for kind, place in kinds if kind == "response.output_item.added"]
    done = [place for kind, place in kinds if kind == "response.output_item.done"]
    assert added == done == [0, 1, 2]
    begun = kinds.index(("response.output_item.added", 2))
    assert kinds.index(("response.output_item.done", 1)) < begun, "one item is open at a time"
    assert begun < kinds.index(("response.function_call_arguments.delta", 2))
    assert client.responses.create(model="m", input=CHAT, tools=tools).output[2].arguments == WRITTEN


@pytest.mark.parametrize("n", [5, 12, 22, 26, 30])
def test_cut_off(client, anthropic_client, n):
    """The reason is the length in every API, and what there is of the arguments is their beginning."""
    choice = client.chat.completions.create(model="m", messages=CHAT, tools=TOOLS, max_tokens=n).choices[0]
    assert choice.finish_reason == "length"
    calls = choice.message.tool_calls or []
    assert all(WRITTEN.startswith(call.function.arguments) for call in calls)
    tools = [{"name": "look_up", "input_schema": FUNCTION["parameters"]}]
    options = {"model": "m", "max_tokens": n, "messages": CHAT, "tools": tools}
    whole = anthropic_client.messages.create(**options)
    assert whole.stop_reason == "max_tokens"
    with anthropic_client.messages.stream(**options) as stream:
        last = stream.get_final_message()
    assert [block.type for block in last.content] == [block.type for block in whole.content]
    blocks = [block for block in whole.content if block.type == "tool_use"]
    assert len(blocks) == len(calls)
    for block in blocks:
        assert ARGUMENTS["query"].startswith(block.input.get("query", ""))
    answer = client.responses.create(
        model="m", input=CHAT, max_output_tokens=n, tools=[{"type": "function", **FUNCTION}]
    )
    assert answer.status == "incomplete"
    assert [item.status for item in answer.output if item.type == "function_call"] == ["incomplete"] * len(calls)


def test_where_thoughts_go(client):
    ask = {"model": "m", "messages": CHAT, "max_tokens": 12}
    apart = client.chat.completions.create(**ask).choices[0].message
    inside = client.chat.completions.create(**ask, extra_body={"reasoning_format": "none"}).choices[0].message
    assert apart.reasoning_content == "Hm, so."
    assert inside.content.startswith("<think>\nHm, so.\n</think>\n\nI look.")
    assert not hasattr(inside, "reasoning_content")
    with pytest.raises(openai.BadRequestError, match="reasoning_format is 'x'"):
        client.chat.completions.create(**ask, extra_body={"reasoning_format": "x"})


@pytest.mark.parametrize("stream", [False, True])
def test_ollama(server, stream):
    """Arguments are objects there, so a call comes when it is whole."""
    found = server.post("/api/chat", {"model": "m", "messages": CHAT, "tools": TOOLS, "stream": stream})[2]
    parts = [json.loads(line) for line in found.splitlines()] if stream else [found]
    messages = [part["message"] for part in parts]
    assert "".join(message["content"] for message in messages) == "I look."
    assert "".join(message.get("thinking", "") for message in messages) == "Hm, so."
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    assert [call["function"] for call in calls] == [{"name": "look_up", "arguments": ARGUMENTS}]
    assert (parts[-1]["done"], parts[-1]["done_reason"]) == (True, "stop")
