"""The openai package against the server: what it sends and what it makes of the answers."""

import asyncio
import base64
import json
import math

import numpy as np
import openai
import pytest

from engine import SamplingParams
from tests.support.servers.vendor_clients import openai_client

CHAT = [{"role": "user", "content": "Tell me of a fox."}]


SETTINGS = {"max_waiting": 4}


def plain(server, prompt, **settings):
    """The result of the engine itself."""
    return server.llm.generate(prompt, SamplingParams(**settings))


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tales"]
    assert client.models.retrieve("story").id == "tales"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("stream", [False, True])
def test_completions_of_texts_and_token_ids(server, client, stream):
    prompts = ["Once upon a time", "The old king"]
    options = {"max_tokens": 12, "seed": 7, "n": 2, "model": "tales"}
    ids = [server.llm.prompt_ids(prompt) for prompt in prompts]
    expected = [plain(server, prompt, max_tokens=12, seed=seed).text for prompt in prompts for seed in (7, 8)]
    for given in (prompts, ids):
        if stream:
            texts, ends = [""] * 4, [None] * 4
            for chunk in client.completions.create(
                prompt=given, stream=True, stream_options={"include_usage": True}, **options
            ):
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
                    ends[choice.index] = choice.finish_reason or ends[choice.index]
                usage = chunk.usage
            assert ends == ["length"] * 4
        else:
            answer = client.completions.create(prompt=given, **options)
            texts, usage = [choice.text for choice in answer.choices], answer.usage
        assert texts == expected
        assert usage.completion_tokens == 48
        assert usage.prompt_tokens == sum(map(len, ids))


def test_every_sampling_field_reaches_the_engine(server, client):
    """Each setting alone changes the text from that without it, and to what the engine gives."""
    base = {"max_tokens": 24, "seed": 5}
    words = server.llm.tokenizer.encode(" the", add_special=False)
    cases = [
        ({"temperature": 0}, {"temperature": 0}, {}),
        ({"top_p": 0.2}, {"top_p": 0.2}, {}),
        ({}, {"top_k": 2}, {"top_k": 2}),
        ({}, {"top_k": 0}, {"top_k": -1}),
        ({}, {"min_p": 0.6}, {"min_p": 0.6}),
        ({}, {"typical_p": 0.1}, {"typical": 0.1}),
        ({}, {"typical_p": 0.1}, {"typical_p": 0.1}),
        ({}, {"repetition_penalty": 1.9}, {"repetition_penalty": 1.9}),
        ({}, {"repetition_penalty": 1.9}, {"repeat_penalty": 1.9}),
        ({"presence_penalty": 2}, {"presence_penalty": 2}, {}),
        ({"frequency_penalty": 2}, {"frequency_penalty": 2}, {}),
        ({}, {"repetition_penalty": 1.9, "penalty_last_n": 8}, {"repeat_penalty": 1.9, "repeat_last_n": 8}),
        ({"logit_bias": {str(words[0]): 30}}, {"logit_bias": {words[0]: 30}}, {}),
        ({}, {"logit_bias": {words[0]: 30}}, {"logit_bias": [[" the", 30]]}),
        ({}, {"logit_bias": {words[0]: -math.inf}}, {"logit_bias": [[words[0], False]]}),
        ({"stop": ["e"]}, {"stop": ["e"]}, {}),
        ({}, {"stop_token_ids": words}, {"stop_token_ids": words}),
        ({"max_tokens": 3}, {"max_tokens": 3}, {}),
        ({}, {"max_tokens": 3}, {"max_completion_tokens": 3}),
        ({}, {"seed": 6}, {"seed": 6}),
    ]
    usual = plain(server, "It was", **base).text
    for fields, settings, extra in cases:
        answer = client.completions.create(model="x", prompt="It was", **{**base, **fields}, extra_body=extra)
        expected = plain(server, "It was", **{**base, **settings})
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, expected.finish_reason)
        assert settings == {"top_k": 0} or extra or fields
        if settings not in ({"top_k": 0}, {"logit_bias": {words[0]: -math.inf}}):
            assert answer.choices[0].text != usual, settings


def test_logprobs_and_echo(server, client):
    prompt = server.llm.prompt_ids("Once upon a time")
    answer = client.completions.create(model="x", prompt=prompt, max_tokens=4, seed=1, logprobs=2, echo=True)
    expected = plain(server, prompt, max_tokens=4, seed=1, logprobs=2, prompt_logprobs=2)
    choice = answer.choices[0]
    assert choice.text == server.llm.tokenizer.decode(prompt) + expected.text
    samples = [*expected.prompt_logprobs, *expected.logprobs]
    assert choice.logprobs.token_logprobs == [None, *(pytest.approx(one.logprob) for one in samples[1:])]
    assert [len(one) for one in choice.logprobs.top_logprobs[1:]] == [2] * (len(samples) - 1)
    spans = [choice.text[start:] for start in choice.logprobs.text_offset[1:]]
    assert all(rest.startswith(token) for rest, token in zip(spans, choice.logprobs.tokens[1:], strict=True))
    scored = client.completions.create(model="x", prompt=prompt, max_tokens=0, logprobs=0, echo=True).choices[0]
    assert scored.text == server.llm.tokenizer.decode(prompt)
    assert scored.logprobs.token_logprobs[1:] == choice.logprobs.token_logprobs[1 : len(prompt)]


@pytest.mark.parametrize("stream", [False, True])
def test_chats(server, client, stream):
    expected = server.llm.chat(CHAT, SamplingParams(max_tokens=20, seed=3, logprobs=3))
    options = {"model": "x", "messages": CHAT, "max_tokens": 20, "seed": 3, "logprobs": True, "top_logprobs": 3}
    if stream:
        text, role, end, entries = "", None, None, []
        for chunk in client.chat.completions.create(stream=True, **options):
            choice = chunk.choices[0]
            role = role or choice.delta.role
            text += choice.delta.content or ""
            end = choice.finish_reason or end
            entries += choice.logprobs.content if choice.logprobs else []
        assert role == "assistant"
    else:
        answer = client.chat.completions.create(**options)
        text, end = answer.choices[0].message.content, answer.choices[0].finish_reason
        entries = answer.choices[0].logprobs.content
        assert answer.usage.completion_tokens == 20
    assert (text, end) == (expected.text, "length")
    assert [entry.logprob for entry in entries] == [pytest.approx(one.logprob) for one in expected.logprobs]
    assert [len(entry.top_logprobs) for entry in entries] == [3] * 20


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_apart(server, client, stream):
    """The template opens a thought; the model is made to close it by a bias that grows nothing else."""
    close = server.llm.tokenizer.encode("</think>", add_special=False)
    options = {
        "model": "x",
        "messages": CHAT,
        "max_tokens": 12,
        "seed": 2,
        "extra_body": {"chat_template_kwargs": {"enable_thinking": True}},
    }
    assert len(close) > 1, "no single token of the vocabulary closes a thought"
    if stream:
        parts = list(client.chat.completions.create(stream=True, **options))
        thought = "".join(getattr(one.choices[0].delta, "reasoning_content", None) or "" for one in parts)
        content = "".join(one.choices[0].delta.content or "" for one in parts)
    else:
        message = client.chat.completions.create(**options).choices[0].message
        thought, content = message.reasoning_content, message.content
    expected = server.llm.chat(CHAT, SamplingParams(max_tokens=12, seed=2), enable_thinking=True)
    assert expected.reasoning
    assert (thought, content) == (expected.reasoning, expected.text)
    low = client.chat.completions.create(model="x", messages=CHAT, max_tokens=3, reasoning_effort="low")
    assert low.choices[0].message.reasoning_content
    none = client.chat.completions.create(model="x", messages=CHAT, max_tokens=3, reasoning_effort="none")
    assert not hasattr(none.choices[0].message, "reasoning_content")


def test_an_answer_is_continued(server, client):
    messages = [*CHAT, {"role": "assistant", "content": "There was a fox who"}]
    answer = client.chat.completions.create(model="x", messages=messages, max_tokens=9, temperature=0)
    text = f"<user> {CHAT[0]['content']}\n<assistant> There was a fox who"
    assert answer.choices[0].message.content == plain(server, text, max_tokens=9, temperature=0).text


def test_the_cache_is_told(server, client):
    prompt = list(range(300, 500))
    first, second = (client.completions.create(model="x", prompt=prompt, max_tokens=1) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 192
    assert second.timings["cache_n"] == second.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_responses(server, client, stream):
    options = {"model": "x", "input": CHAT, "instructions": "Be brief.", "max_output_tokens": 10, "temperature": 0}
    expected = server.llm.chat(
        [{"role": "system", "content": "Be brief."}, *CHAT], SamplingParams(max_tokens=10, temperature=0)
    ).text
    if stream:
        with client.responses.stream(**options) as events:
            text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
            answer = events.get_final_response()
        assert text == expected
    else:
        answer = client.responses.create(**options)
    assert answer.output_text == expected
    assert answer.status == "incomplete"
    assert answer.usage.output_tokens == 10
    again = client.responses.create(
        **{**options, "input": [*CHAT, {"role": "assistant", "content": answer.output_text}, *CHAT]}
    )
    assert again.usage.input_tokens > answer.usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10_000}, "n"),
        ({"n": 20}, "n"),
        ({"stop": [1]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"extra_body": {"repeat_penalty": 1000.0}}, "repeat_penalty"),
        ({"extra_body": {"max_completion_tokens": -3}}, "max_completion_tokens"),
        ({"extra_body": {"typical": 3}}, "typical"),
        ({"logit_bias": {"x": 1000_000_000}}, "logit_bias"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        ({"extra_body": {"logit_bias": [["abc " * 100, 1]] * 100}}, "logit_bias"),
        ({"extra_body": {"guided_regex": "(a|b)*" * 50_000}}, "guided_regex"),
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"top_logprobs": 5, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": 99, "logprobs": True}, "top_logprobs"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"tools": "f"}, "tools"),
        ({"extra_body": {"mirostat": 2}}, "mirostat"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ],
)
def test_wrong_fields_are_named(client, fields, param):
    options = {"model": "x", "messages": CHAT, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**options)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_what_is_not_known_or_off_is_ignored(client):
    extra = {"service_tier": "auto", "mirostat": 0, "response_format": {"type": "text"}, "tools": [], "user": "me"}
    answer = client.chat.completions.create(model="gpt-4o", messages=CHAT, max_tokens=2, extra_body=extra)
    assert answer.choices[0].message.content is not None


def test_too_long_prompts_are_refused_and_too_many_tokens_are_cut(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="x", prompt=list(range(1, 1025)), max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    answer = client.completions.create(
        model="x", prompt=list(range(1, 1021)), max_tokens=500, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 4
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("form", [openai.NOT_GIVEN, "float", "base64"])
def test_embeddings_of_texts_and_token_ids(server, client, form):
    texts = ["Once upon a time", "The old king"]
    expected = server.llm.embed(texts, dimensions=48)
    ids = [server.llm.prompt_ids(text) for text in texts]
    for given in (texts, ids):
        answer = client.embeddings.create(model="tales", input=given, dimensions=48, encoding_format=form)
        found = [entry.embedding for entry in answer.data]
        if form == "base64":
            found = [np.frombuffer(base64.b64decode(one), np.float32) for one in found]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        assert [entry.index for entry in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    one = client.embeddings.create(model="tales", input=ids[0], dimensions=48).data
    np.testing.assert_allclose([entry.embedding for entry in one], expected[:1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": "a", "dimensions": 100000}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": ["a"] * 5000}, "input"),
    ],
)
def test_embeddings_that_are_refused(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/embeddings", body=fields, cast_to=object)
    assert caught.value.param == param


def test_asynchronous_clients_share_the_batch(server):
    async def main():
        async with openai_client(server, kind=openai.AsyncOpenAI) as client:

            async def one(seed):
                stream = await client.completions.create(
                    model="x", prompt="The fox", max_tokens=15, seed=seed, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(seed) for seed in range(6)))

    texts = asyncio.run(main())
    assert texts == [plain(server, "The fox", max_tokens=15, seed=seed).text for seed in range(6)]


def test_a_full_queue_is_retried(server):
    """Four run and four wait; the client's retries get the ninth through."""
    endless = {"model": "x", "prompt": "The", "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    with openai_client(server) as client:
        streams = [client.completions.create(stream=True, **endless) for _ in range(8)]
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="x", prompt="The", max_tokens=1)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        patient = client.with_options(max_retries=5)
        for stream in streams:
            stream.close()
        assert patient.completions.create(model="x", prompt="The", max_tokens=1).choices[0].finish_reason == "length"
    assert not any(server.settle())


def test_a_client_that_times_out_frees_its_place(server, client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(
            model="x", prompt="The", n=4, extra_body={"ignore_eos": True}
        )
    assert not any(server.settle())


def test_a_stream_has_only_whole_characters(server, client):
    """Bytes of characters are single tokens of this vocabulary; a bias makes the model write them."""
    ids = [server.llm.tokenizer.encode(text, add_special=False)[-1] for text in ("é", "☃", "😀")]
    stream = client.completions.create(
        model="x", prompt="The", max_tokens=40, seed=1, stream=True, logit_bias={str(one): 40 for one in ids}
    )
    texts = [chunk.choices[0].text for chunk in stream]
    expected = plain(server, "The", max_tokens=40, seed=1, logit_bias=dict.fromkeys(ids, 40.0)).text
    assert "".join(texts) == expected
    assert json.dumps(expected)
