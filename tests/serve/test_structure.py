"""What answers have to be, asked for with the openai package and in the words of the other APIs."""

import json
import re
from contextlib import suppress

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

CHAT = [{"role": "user", "content": "Tell me of a fox."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "fox", "schema": SCHEMA, "strict": True}}
GBNF = 'root ::= ("a" | "b") [0-9]'
LARK = 'start: ("a" | "b") /[0-9]/'


class Fox(BaseModel):
    name: str = Field(max_length=6)
    legs: int = Field(ge=1, le=4)
    friends: list["Fox"] = Field(max_length=1)


class Hare(BaseModel):
    legs: int = Field(ge=1, le=4)


def fits(text):
    jsonschema.validate(json.loads(text), SCHEMA)


def test_a_pydantic_model_is_parsed(client):
    for seed in range(20):  # which of them end depends on the last bits of this processor's sums
        with suppress(openai.LengthFinishReasonError):
            answer = client.chat.completions.parse(
                model="x", messages=CHAT, response_format=Fox, seed=seed, max_tokens=300
            )
            break
    assert answer.choices[0].finish_reason == "stop"
    assert 1 <= answer.choices[0].message.parsed.legs <= 4
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="x", messages=CHAT, response_format=Fox, seed=1, max_tokens=2)


def test_log_probabilities_of_the_masked_and_of_the_free_distribution(client):
    def entries(**extra):
        answer = client.chat.completions.create(
            model="x", messages=CHAT, seed=1, logprobs=True, extra_body={"guided_choice": ["a fox"], **extra}
        )
        assert answer.choices[0].message.content == "a fox"
        return [one.logprob for one in answer.choices[0].logprobs.content]

    assert entries() == entries(free_logprobs=False) == [0.0] * len(entries())
    assert all(value < 0 for value in entries(free_logprobs=True))
    with pytest.raises(openai.BadRequestError, match="free_logprobs"):
        entries(free_logprobs="often")


def test_several_answers_streamed_with_logprobs(client):
    options = {"model": "x", "messages": CHAT, "response_format": FORMAT, "seed": 4, "n": 3, "max_tokens": 80}
    whole = client.chat.completions.create(**options, temperature=1.3, logprobs=True, top_logprobs=2)
    texts, numbers = [""] * 3, [0] * 3
    for chunk in client.chat.completions.create(**options, temperature=1.3, logprobs=True, top_logprobs=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            numbers[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert texts == [choice.message.content for choice in whole.choices]
    assert numbers == [len(choice.logprobs.content) for choice in whole.choices]
    assert len(set(texts)) > 1
    for choice in whole.choices:
        fits(choice.message.content)


def test_responses(client):
    form = {"type": "json_schema", "name": "fox", "schema": SCHEMA, "strict": True}
    answer = client.responses.create(model="x", input="A fox", text={"format": form}, max_output_tokens=80)
    fits(answer.output_text)
    assert answer.text.format.type == "json_schema"
    cut = client.responses.create(model="x", input="A fox", text={"format": form}, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    parsed = client.responses.parse(model="x", input="A fox", text_format=Hare, max_output_tokens=300)
    assert parsed.output_parsed.legs


def test_anthropic(anthropic_client):
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = anthropic_client.messages.create(
        model="x", messages=CHAT, max_tokens=80, extra_body={"output_config": form}
    )
    fits(answer.content[0].text)
    assert anthropic_client.messages.create(
        model="x", messages=CHAT, max_tokens=2, extra_body={"output_config": {"effort": "low"}}
    )


CHOSEN = ["yes", "no"]
FIELDS = [
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, fits),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, fits),
    ({"json_schema": SCHEMA}, fits),
    ({"json_schema": json.dumps(SCHEMA)}, fits),
    ({"grammar": GBNF}, "[ab][0-9]"),
    ({"structured_outputs": {"json": SCHEMA, "disable_fallback": True}}, fits),
    ({"structured_outputs": {"regex": "[a-c]{2,4}"}}, "[a-c]{2,4}"),
    ({"structured_outputs": {"choice": CHOSEN}}, "yes|no"),
    ({"structured_outputs": {"grammar": GBNF}}, "[ab][0-9]"),
    ({"structured_outputs": {"grammar": LARK}}, "[ab][0-9]"),
    ({"guided_json": SCHEMA}, fits),
    ({"guided_regex": "[a-c]{2,4}"}, "[a-c]{2,4}"),
    ({"guided_choice": CHOSEN}, "yes|no"),
    ({"guided_grammar": LARK}, "[ab][0-9]"),
]


@pytest.mark.parametrize(("fields", "check"), FIELDS, ids=[str(one) for one in range(len(FIELDS))])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/completion", "/v1/completions"])
def test_every_field_at_every_endpoint(server, path, fields, check):
    asked = {"messages": CHAT} if "chat" in path else {"prompt": "Once"}
    body = {**asked, **fields, "max_tokens": 80, "seed": 2}
    status, _, answer = server.post(path, body)
    assert status == 200, answer
    text = answer.get("content") or (answer["choices"][0].get("text") or answer["choices"][0]["message"]["content"])
    assert check(text) is None if callable(check) else re.fullmatch(check, text)


def test_objects_of_any_kind(server, client):
    answer = client.chat.completions.create(
        model="x", messages=CHAT, response_format={"type": "json_object"}, max_tokens=40, seed=1
    )
    text, end = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text.startswith("{")
    assert end == "length" or isinstance(json.loads(text), dict)


@pytest.mark.parametrize("form", ["json", SCHEMA])
def test_ollama(server, form):
    options = {"num_predict": 80, "seed": 3}
    for path, asked in (("/api/chat", {"messages": CHAT}), ("/api/generate", {"prompt": "A fox"})):
        body = {**asked, "format": form, "stream": False, "options": options}
        status, _, answer = server.post(path, body)
        text = answer.get("response") or answer["message"]["content"]
        assert status == 200
        assert fits(text) is None if form != "json" else text.startswith("{")
    assert server.post("/api/chat", {"messages": CHAT, "format": "yaml"})[0] == 400


FORM = "response_format"


def form_of(schema):
    return {FORM: {"type": "json_schema", "json_schema": schema}}


REFUSED = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": "json"}, "response_format", "object"),
    ({"response_format": {"type": "json_schema"}}, "response_format.schema", "missing"),
    (form_of({"name": "x"}), "response_format.json_schema.schema", "missing"),
    (form_of({"schema": {"type": "objec"}}), FORM, "objec"),
    (form_of({"schema": {"not": {}}}), FORM, "not"),
    ({"json_schema": "{"}, "json_schema", "JSON"),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema", "uniqueItems"),
    ({"grammar": "root ::= ("}, "grammar", ""),
    ({"grammar": 7}, "grammar", "7"),
    ({"grammar": GBNF, "json_schema": SCHEMA}, "json_schema", "both"),
    ({"grammar": GBNF, "grammar_lazy": True}, "grammar_lazy", ""),
    ({"guided_regex": "("}, "guided_regex", "unclosed"),
    ({"guided_choice": []}, "guided_choice", ""),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "one"),
    ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag", "supported"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "supported"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=[str(one) for one in range(len(REFUSED))])
def test_what_cannot_be_done_is_refused_and_named(server, fields, param, words):
    for asked in ({"messages": CHAT, "stream": True}, {"prompt": "x"}):
        path = "/v1/completions" if "prompt" in asked else "/v1/chat/completions"
        status, _, answer = server.post(path, {**asked, **fields, "max_tokens": 4})
        error = answer["error"]
        assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
        assert words in error["message"]
        assert len(error["message"]) < 500
        assert "\n" not in error["message"]
    assert not any(server.settle())


def test_thoughts_come_before(server):
    """The template opens a thought on request; the story-teller never ends it, so nothing of the answer is there."""
    body = {"messages": CHAT, "response_format": FORMAT, "max_tokens": 20, "reasoning_effort": "high"}
    choice = server.post("/v1/chat/completions", body)[2]["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert choice["message"]["reasoning_content"]
