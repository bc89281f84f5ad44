"""The anthropic package against the server."""

import asyncio

import anthropic
import pytest

from engine import SamplingParams
from tests.support.servers.http_server import running
from tests.support.servers.vendor_clients import anthropic_client

CHAT = [{"role": "user", "content": "Tell me of a fox."}]


SETTINGS = {"api_keys": ("secret",)}


@pytest.fixture(scope="module")
def client(server):
    with anthropic_client(server, api_key="secret") as one:
        yield one


def options(**more):
    """Arguments of a call; sampling goes into extra_body, as the package's versions differ in what they name."""
    extra = {name: more.pop(name) for name in ("top_p",) if name in more}
    return {
        "model": "tales",
        "messages": CHAT,
        "max_tokens": 12,
        "extra_body": {"temperature": 0, **extra},
        **more,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_messages(server, client, stream):
    system = [{"type": "text", "text": "Be brief."}]
    expected = server.llm.chat(
        [{"role": "system", "content": "Be brief."}, *CHAT], SamplingParams(max_tokens=12, temperature=0)
    )
    if stream:
        with client.messages.stream(**options(system=system)) as events:
            text = "".join(events.text_stream)
            answer = events.get_final_message()
        assert text == expected.text
    else:
        answer = client.messages.create(**options(system=system))
    assert [block.text for block in answer.content] == [expected.text]
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 12
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == len(expected.prompt_token_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_a_block_of_its_own(server, client, stream):
    expected = server.llm.chat(CHAT, SamplingParams(max_tokens=12, temperature=0), enable_thinking=True)
    thinking = {"type": "enabled", "budget_tokens": 1024}
    if stream:
        with client.messages.stream(**options(thinking=thinking)) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**options(thinking=thinking))
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[0].thinking == expected.reasoning


def test_a_thought_in_the_history_is_no_part_of_the_text(client):
    blocks = [{"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "text", "text": "A fox."}]
    plain = [*CHAT, {"role": "assistant", "content": "A fox."}, *CHAT]
    thought = [*CHAT, {"role": "assistant", "content": blocks}, *CHAT]
    counts = [client.messages.count_tokens(model="x", messages=one).input_tokens for one in (plain, thought)]
    assert counts[0] == counts[1] > 0


def test_a_stop_sequence_and_an_answer_to_continue(server, client):
    begun = [*CHAT, {"role": "assistant", "content": "There was a fox who"}]
    answer = client.messages.create(**options(messages=begun, stop_sequences=["e"], max_tokens=100))
    text = f"<user> {CHAT[0]['content']}\n<assistant> There was a fox who"
    expected = server.llm.generate(text, SamplingParams(max_tokens=100, temperature=0, stop=["e"]))
    assert answer.content[0].text == expected.text
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "e")


def test_errors_have_anthropics_form(server, client):
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**options(top_p=7))
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert "top_p" in caught.value.body["error"]["message"]
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    for content in ([image], [{"type": "search_result"}], 3):
        with pytest.raises(anthropic.BadRequestError, match="messages"):
            client.messages.create(**options(messages=[{"role": "user", "content": content}]))
    with pytest.raises(anthropic.BadRequestError, match="tools"):
        client.messages.create(**options(tools=[{"type": "web_search_20250305", "name": "web_search"}]))
    with (
        anthropic_client(server, api_key="other") as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.messages.create(**options())


def test_the_asynchronous_client(server):
    async def main():
        async with anthropic_client(server, kind=anthropic.AsyncAnthropic, api_key="secret") as client:
            answers = await asyncio.gather(*(client.messages.create(**options()) for _ in range(3)))
            async with client.messages.stream(**options()) as stream:
                return {answer.content[0].text for answer in answers} | {await stream.get_final_text()}

    assert len(asyncio.run(main())) == 1


def test_a_full_server_is_tried_again_and_a_late_answer_is_given_up():
    endless = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
    with (
        running(max_waiting=0, engine={"max_sequences": 1}) as server,
        anthropic_client(server) as client,
    ):
        holder = client.messages.create(**options(stream=True, **endless))
        with pytest.raises(anthropic.RateLimitError) as caught:
            client.messages.create(**options())
        assert caught.value.body["error"]["type"] == "rate_limit_error"
        holder.close()
        assert client.with_options(max_retries=5).messages.create(**options()).stop_reason == "max_tokens"
        with pytest.raises(anthropic.APITimeoutError):
            client.with_options(timeout=0.1).messages.create(**options(**endless))
        assert not any(server.settle())
