"""Tools over HTTP with the packages of both vendors: calls are asked for, come, are answered, and go on."""

import json

import jsonschema
import openai
import pytest

from engine.serve.answers.ollama_calls import with_ids

CHAT = [{"role": "user", "content": "How warm is it?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "clock"}}


SETTINGS = {"max_waiting": 4}


def ask(client, messages=CHAT, **fields):
    options = {"model": "tales", "max_tokens": 200, "seed": 3, "temperature": 1.5, "tools": [TOOL, OTHER], **fields}
    return client.chat.completions.create(messages=messages, **options)


def test_tools_beside_a_response_format(client):
    """The content follows the schema unless a tool is called; a call that must come needs no content."""
    shape = {"type": "json_schema", "json_schema": {"name": "note", "schema": SCHEMA}}
    for seed in range(3):
        answer = ask(client, response_format=shape, seed=seed, max_tokens=300, parallel_tool_calls=False).choices[0]
        if answer.message.tool_calls:
            assert answer.finish_reason == "tool_calls"
        else:
            jsonschema.validate(json.loads(answer.message.content), SCHEMA)
    forced = (
        ask(client, response_format=shape, tool_choice="required", max_tokens=400, parallel_tool_calls=False)
        .choices[0]
        .message
    )
    assert forced.tool_calls
    assert not forced.content
    none = ask(client, response_format=shape, tool_choice="none", max_tokens=300).choices[0].message
    jsonschema.validate(json.loads(none.content), SCHEMA)


def test_a_loop_of_calls_and_results(client):
    choice = ask(client, tool_choice={"type": "function", "function": {"name": "weather"}}).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    after = [*CHAT, choice.message.model_dump(exclude_none=True), result]
    shown = ask(client, after, tool_choice="none", max_tokens=4, extra_body={"verbose": True})
    assert "21 degrees" in shown.model_extra["__verbose"]["prompt"]
    assert shown.choices[0].message.tool_calls is None
    auto = ask(client, after, max_tokens=4, extra_body={"verbose": True}).model_extra["__verbose"]["prompt"]
    assert "21 degrees" in auto
    assert '{"name": "weather", "arguments": ' in auto


def test_streamed_calls_are_those_of_the_whole_answer(client):
    for seed in range(20):  # which of them end with a whole call depends on the last bits of this processor's sums
        fields = {"tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        answer = ask(client, **fields).choices[0]
        if answer.finish_reason == "tool_calls":
            break
    whole = answer.message.tool_calls
    names, arguments, reasons = {}, {}, []
    for chunk in ask(client, **fields, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            if part.id is not None:
                names[part.index] = part.function.name
            arguments[part.index] = arguments.get(part.index, "") + (part.function.arguments or "")
        reasons.append(chunk.choices[0].finish_reason)
    assert list(zip(names.values(), arguments.values(), strict=True)) == [
        (call.function.name, call.function.arguments) for call in whole
    ]
    assert reasons[-1] == "tool_calls"


def named(name, properties=None):
    parameters = {"type": "object", "properties": properties or {}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "names the function 'x'"),
        ({"tool_choice": "never"}, "tool_choice is 'never'"),
        ({"tools": [TOOL, TOOL]}, "two functions named"),
        ({"tools": [named(f"f{number}") for number in range(10_000)]}, "10000 functions; allowed: at most 1024"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "the name 'a b'"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {"type": "string"}}}}]},
            "tool 'f' cannot be held to their schema",
        ),
    ],
)
def test_what_cannot_be_is_refused(client, fields, what):
    with pytest.raises(openai.BadRequestError, match=what):
        ask(client, **fields)


def test_reasoning_is_ended_after_so_many_tokens(client):
    body = {"chat_template_kwargs": {"enable_thinking": True}, "max_reasoning_tokens": 5}
    message = ask(client, tools=None, max_tokens=60, extra_body=body).choices[0].message
    assert message.content.strip()
    assert 0 < len(message.reasoning_content) < 60


def test_the_other_vendors_loop(anthropic_client):
    tool = {"name": "weather", "input_schema": SCHEMA}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    options = {"model": "tales", "max_tokens": 400, "tools": [tool], "tool_choice": choice, "extra_body": {"seed": 3}}
    first = anthropic_client.messages.create(messages=CHAT, **options)
    assert first.stop_reason == "tool_use"
    calls = [block for block in first.content if block.type == "tool_use"]
    for call in calls:
        jsonschema.validate(call.input, SCHEMA)
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "21 degrees"} for call in calls]
    after = [
        *CHAT,
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": results},
    ]
    with anthropic_client.messages.stream(messages=after, **options) as stream:
        last = stream.get_final_message()
    assert last.stop_reason == "tool_use"
    jsonschema.validate(last.content[-1].input, SCHEMA)


@pytest.mark.parametrize("stream", [False, True])
def test_responses(client, stream):
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA}
    options = {"model": "tales", "tools": [tool], "max_output_tokens": 200, "tool_choice": "required"}
    options |= {"parallel_tool_calls": False, "input": CHAT, "extra_body": {"seed": 3}}
    if stream:
        with client.responses.stream(**options) as events:
            answer = [*events] and events.get_final_response()
    else:
        answer = client.responses.create(**options)
    (item,) = answer.output
    assert (item.type, item.name) == ("function_call", "weather")
    jsonschema.validate(json.loads(item.arguments), SCHEMA)
    output = {"type": "function_call_output", "call_id": item.call_id, "output": "21 degrees"}
    options["input"] = [*CHAT, item.model_dump(exclude={"parsed_arguments"}), output]
    assert client.responses.create(**options).output[0].type == "function_call"


def test_ollamas_loop_of_calls_and_results(server):
    """As its client writes it: no ids, results by the names of tools. The prompt is that of OpenAI's form."""
    body = {"messages": CHAT, "tools": [TOOL, OTHER], "tool_choice": "required", "stream": False}
    options = {"seed": 3, "temperature": 1.5, "num_predict": 400}
    answer = server.post("/api/chat", {**body, "parallel_tool_calls": False, "options": options})[2]["message"]
    (call,) = answer["tool_calls"]
    assert call["function"]["name"] in ("weather", "clock")
    if call["function"]["name"] == "weather":
        jsonschema.validate(call["function"]["arguments"], SCHEMA)
    asked = [
        {"function": {"name": name, "arguments": given}} for name, given in (("clock", {}), ("weather", {"city": "x"}))
    ]
    results = [("weather", "21 degrees"), ("clock", "noon")]
    history = [{"role": "assistant", "content": "", "tool_calls": asked}]
    history += [{"role": "tool", "tool_name": name, "content": content} for name, content in results]
    said = server.post("/api/chat", {"messages": [*CHAT, *history], "stream": False, "options": {"num_predict": 2}})
    assert said[0] == 200
    made = with_ids([*CHAT, *history])
    ids = {one["function"]["name"]: one["id"] for one in made[1]["tool_calls"]}
    assert len(set(ids.values())) == 2
    assert [(one["name"], one["tool_call_id"], one["content"]) for one in made[2:]] == [
        (name, ids[name], content) for name, content in results
    ]
    assert server.post("/api/show", {"model": "tales"})[2]["capabilities"] == ["completion", "tools"]
    assert server.post("/api/chat", {"messages": CHAT, "tools": [{}]})[0] == 400
