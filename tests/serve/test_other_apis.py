"""llama.cpp's and Ollama's endpoints, the lists, and what the server tells about itself."""

import json

import pytest

from engine import SamplingParams, __version__
from tests.support.servers.http_server import TEMPLATE, running

CHAT = [{"role": "user", "content": "Tell me of a fox."}]


def lines(data):
    return [json.loads(line) for line in data.decode().splitlines()]


def test_completion(server):
    expected = server.llm.generate("Once upon", SamplingParams(max_tokens=10, seed=3, logprobs=2))
    body = {"prompt": "Once upon", "n_predict": 10, "seed": 3, "n_probs": 2, "return_tokens": True}
    status, _, whole = server.post("/completion", body)
    assert (status, whole["content"], whole["tokens"]) == (200, expected.text, expected.token_ids)
    assert (whole["stop"], whole["stop_type"], whole["tokens_evaluated"]) == (True, "limit", 3)
    assert whole["generation_settings"]["seed"] == 3
    assert [len(entry["top_logprobs"]) for entry in whole["completion_probabilities"]] == [2] * 10
    events = [data for _, data in server.events("/completion", {**body, "stream": True})]
    assert [len(one["completion_probabilities"]) for one in events[:-1]] == [1] * 10
    assert "".join(one["content"] for one in events) == expected.text
    assert [token for one in events for token in one["tokens"]] == expected.token_ids
    assert [one["stop"] for one in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["timings"]["predicted_n"] == 10


def test_completion_of_several_and_mixed_prompts(server):
    ids = server.llm.tokenizer.encode(" upon", add_special=False)
    greedy = {"n_predict": 6, "temperature": 0}
    one = server.post("/completion", {"prompt": "Once upon", **greedy})[2]["content"]
    assert server.post("/completion", {"prompt": ["Once", *ids], **greedy})[2]["content"] == one
    assert server.post("/completion", {"prompt": {"prompt_string": "Once upon"}, **greedy})[2]["content"] == one
    several = server.post("/completion", {"prompt": ["Once upon", "The"], **greedy})[2]
    assert [value["content"] for value in several] == [
        one,
        server.post("/completion", {"prompt": "The", **greedy})[2]["content"],
    ]
    chosen = server.post(
        "/completion", {"prompt": "A", **greedy, "response_fields": ["content", "timings/predicted_n"]}
    )
    assert set(chosen[2]) == {"content", "timings/predicted_n"}
    assert server.post("/completion", {"prompt": [None]})[0] == 400


def test_stop_words_and_end_tokens_are_told_apart(server):
    word = server.post("/completion", {"prompt": "Once", "stop": ["e"], "temperature": 0})[2]
    assert (word["stop_type"], word["stopping_word"]) == ("word", "e")
    end = server.llm.tokenizer.eos_id
    eos = server.post("/completion", {"prompt": "Once", "logit_bias": [[end, 1000]]})[2]
    assert (eos["stop_type"], eos["content"]) == ("eos", "")


def test_text_and_tokens(server):
    tokenizer = server.llm.tokenizer
    text = "A fox ☃ <|endoftext|>"
    assert server.post("/tokenize", {"content": text})[2]["tokens"] == tokenizer.encode(text, add_special=False)
    assert server.post("/tokenize", {"content": text, "add_special": True})[2]["tokens"] == tokenizer.encode(text)
    plain = tokenizer.encode(text, add_special=False, parse_special=False)
    assert server.post("/tokenize", {"content": text, "parse_special": False})[2]["tokens"] == plain
    vllm = server.post("/tokenize", {"prompt": text})[2]
    assert (vllm["tokens"], vllm["count"]) == (tokenizer.encode(text), len(tokenizer.encode(text)))
    pieces = server.post("/tokenize", {"content": text, "with_pieces": True})[2]["tokens"]
    raw = b"".join(bytes(one["piece"]) if isinstance(one["piece"], list) else one["piece"].encode() for one in pieces)
    assert raw.decode() == text
    assert server.post("/detokenize", {"tokens": plain})[2]["content"] == text
    assert server.post("/detokenize", {"tokens": [10**9]})[0] == 400
    assert server.post("/apply-template", {"messages": CHAT})[2] == {"prompt": "<user> Tell me of a fox.\n<assistant> "}
    bare = {"messages": CHAT, "add_generation_prompt": False}
    assert server.post("/apply-template", bare)[2] == {"prompt": "<user> Tell me of a fox.\n"}
    assert server.post("/v1/chat/completions", bare)[2]["error"]["param"] == "add_generation_prompt"
    rendered = server.llm.render_chat(CHAT)
    assert server.post("/tokenize", {"messages": CHAT})[2]["tokens"] == rendered


@pytest.mark.parametrize("stream", [False, True])
def test_ollama(server, stream):
    params = SamplingParams(max_tokens=8, temperature=0)
    options = {"num_predict": 8, "temperature": 0}
    chat = server.llm.chat(CHAT, params).text
    _, headers, found = server.post(
        "/api/chat", {"model": "tales:latest", "messages": CHAT, "options": options, "stream": stream}
    )
    if stream:
        assert headers["content-type"] == "application/x-ndjson"
        parts = lines(found)
        assert "".join(one["message"]["content"] for one in parts) == chat
        found = parts[-1]
    else:
        assert found["message"] == {"role": "assistant", "content": chat}
    assert (found["done"], found["done_reason"], found["eval_count"]) == (True, "length", 8)
    body = {"model": "tales", "prompt": "Once upon", "options": options, "stream": stream, "raw": True}
    found = server.post("/api/generate", body)[2]
    text = "".join(one["response"] for one in lines(found)) if stream else found["response"]
    assert text == server.llm.generate("Once upon", params).text


def test_ollamas_thoughts_lists_and_errors(server):
    body = {"messages": CHAT, "think": True, "stream": False, "options": {"num_predict": 5}}
    assert server.post("/api/chat", body)[2]["message"]["thinking"]
    assert server.get("/api/version")[2] == {"version": __version__}
    for path in ("/api/tags", "/api/ps"):
        assert [one["name"] for one in server.get(path)[2]["models"]] == ["tales"]
    shown = server.post("/api/show", {"model": "tales"})[2]
    assert shown["template"] == TEMPLATE
    assert shown["model_info"]["llama.context_length"] == 1024
    assert server.post("/api/generate", {"model": "tales"})[2]["done_reason"] == "load"
    status, _, error = server.post("/api/chat", {"messages": CHAT, "options": {"top_p": 3.5}})
    assert (status, list(error)) == (400, ["error"])
    assert "top_p" in error["error"]
    assert server.post("/api/chat", {"messages": CHAT, "images": ["AA=="]})[0] == 400


def test_what_the_server_says_of_itself(server):
    assert server.get("/health")[::2] == (200, {"status": "ok"})
    assert server.get("/version")[2] == {"version": __version__}
    props = server.get("/props")[2]
    assert (props["total_slots"], props["model_alias"], props["chat_template"]) == (4, "tales", TEMPLATE)
    assert props["model_path"].endswith(".gguf")
    slots = server.get("/slots")[2]
    assert [slot["is_processing"] for slot in slots] == [False] * 4
    entry = server.get("/v1/models")[2]["data"][0]
    assert (entry["id"], entry["aliases"], entry["max_model_len"]) == ("tales", ["story"], 1024)
    assert server.get("/")[0] == 200
    status, _, error = server.get("/nothing")
    assert (status, error["error"]["type"]) == (404, "not_found_error")
    assert server.get("/v1/completions")[0] == 405
    status, _, error = server.post("/v1/rerank", {"query": "x", "documents": ["a"]})
    assert (status, "no classification head" in error["error"]["message"]) == (400, True)


def test_slots_and_metrics_while_a_request_runs(server):
    connection = server.connect()
    body = json.dumps({"prompt": "The", "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    received = b""
    while b"data: " not in received:  # the head of the answer may come before the first step
        received += connection.recv(100)
    busy = [slot for slot in server.get("/slots")[2] if slot["is_processing"]]
    text = server.get("/metrics")[2].decode()
    connection.close()
    assert [(slot["n_prompt_tokens"], slot["n_ctx"]) for slot in busy] == [(2, 1024)]
    assert 'vllm:num_requests_running{model_name="tales"} 1.0' in text
    assert not any(server.settle())


def metrics_of(server):
    text = server.get("/metrics")[2].decode()
    return {
        line.split("{")[0].split(" ")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"
    }


@pytest.mark.parametrize("style", ["vllm", "llamacpp"])
def test_metrics_count_what_was_done(style):
    with running(metrics_style=style) as server:
        prompt = list(range(100, 200))
        for _ in range(2):
            assert server.post("/v1/completions", {"prompt": prompt, "max_tokens": 7, "ignore_eos": True})[0] == 200
        assert server.post("/v1/completions", {"prompt": prompt, "top_p": 7.0})[0] == 400
        found = metrics_of(server)
        if style == "vllm":
            assert found["vllm:prompt_tokens_total"] == found["vllm:prefix_cache_queries_total"] == 200
            assert 64 <= found["vllm:prefix_cache_hits_total"] < 100
            assert found["vllm:generation_tokens_total"] == 14
            assert found["vllm:request_success_total"] == 2
            assert found["vllm:time_to_first_token_seconds_count"] == 2
            assert 0 < found["vllm:inter_token_latency_seconds_count"] <= 12
            assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
        else:
            cached = found["llamacpp:prompt_tokens_cached_total"]
            assert 64 <= cached < 100
            assert found["llamacpp:prompt_tokens_total"] == 200 - cached
            assert found["llamacpp:tokens_predicted_total"] == found["llamacpp:n_decode_total"] == 14
