"""Work that grows with a request: counted while its body arrives, checked once, and done away from the event loop."""

import gc
import json
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.serve import app, errors
from engine.serve.answers import long_work
from engine.serve.answers.ollama_calls import with_ids
from engine.serve.fields.body import Body
from engine.serve.json_values import MOST_VALUES, WEIGHT, ValueCount, most_values
from engine.text import Tokenizer

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=40)
SIGNS = st.text(alphabet='\\",:[]{}\n é')


def counted(value):
    """What ValueCount should count, from the parsed value."""
    if isinstance(value, dict):
        return WEIGHT + len(value) * WEIGHT + max(len(value) - 1, 0) + sum(map(counted, value.values()))
    if isinstance(value, list):
        return WEIGHT + max(len(value) - 1, 0) + sum(map(counted, value))
    return 0


@given(VALUES | st.lists(SIGNS) | st.dictionaries(SIGNS, SIGNS), st.booleans(), st.data())
def test_values_are_counted_wherever_the_text_is_cut(value, ascii, data):
    raw = json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    count = ValueCount()
    for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        count.add(raw[begin:end])
    assert count.n == 1 + counted(value)


def test_a_larger_body_may_have_more_values():
    assert most_values(1) == most_values(16 << 20) == MOST_VALUES
    assert most_values(64 << 20) == 4 * MOST_VALUES


PARTS = [app.models, app.completions, app.chat, app.responses, app.messages, app.ollama, app.completion, app.embeddings]


def posts(serving):
    """Paths of all endpoints that take a body."""
    routes = [route for part in (*PARTS, app.text) for route in part.router(serving).routes]
    return [route.path for route in routes if "POST" in route.methods]


def test_no_endpoint_takes_more_values_than_can_be_read_at_once(server, monkeypatch):
    """Refused before any of them is parsed, in the words of the API that was called."""
    monkeypatch.setattr(Body, "model_validate_json", None)
    many = b'{"prompt": [' + b"1," * MOST_VALUES + b"1]}"
    paths = posts(server.serving)
    assert len(paths) > 20
    for path in paths:
        status, _, answer = server.post(path, many)
        error = answer["error"]
        message = error if isinstance(error, str) else error["message"]
        assert status == 413, path
        assert f"{MOST_VALUES + 1 + 3 * WEIGHT} JSON values" in message
        assert f"at most {MOST_VALUES}" in message
        assert "--max-body" in message


def test_commas_in_texts_are_no_values(server):
    text = "a," * (MOST_VALUES // 2) + '"\\' * 9
    status, _, answer = server.post("/v1/completions", {"prompt": [text, text, text], "max_tokens": 1})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def kinds():
    found, left = [], [Body]
    while left:
        one = left.pop()
        left += one.__subclasses__()
        found += [one] if one.__module__.startswith("engine.") and one is not Body else []
    return found


def complaints(kind, value):
    try:
        kind.model_validate_json(json.dumps(value))
    except ValidationError as error:
        return error.error_count()
    return 0


WRONG = [1.5, "a", None, [1.5], [[None]], {"a": [{}]}, {"type": None}]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")
def test_the_first_wrong_entry_ends_the_check_of_a_field(kind):
    """pydantic notes 5 kB for each: a body of 16 MB would take 14 GB."""
    for name in kind.model_fields:
        for many in (*([one] * 3000 for one in WRONG), {str(i): [1.5] for i in range(3000)}):
            assert complaints(kind, {name: many}) < 10, name


def old_json(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


@given(VALUES)
def test_an_answer_in_pieces_is_the_same(value):
    with pytest.MonkeyPatch.context() as patch:
        for piece in (1, 2, 5, 30):
            patch.setattr(long_work, "PIECE", piece)
            assert long_work.written(value).body == errors.json_response(value).body == errors.dump(value)


ANSWERS = {
    "text": "a\nb" * 100,
    "ids": list(range(100_000)),
    "pieces": [{"id": i, "piece": [i, i]} for i in range(50_000)],
    "vectors": [[0.5] * 512 for _ in range(200)],
    "scores": [None, *([{str(i): {"logprob": -1.0} for i in range(20)}] * 3000)],
    "one of many": [{"logprobs": {"content": [{"top": [{"id": 1}] * 20}] * 4000}}],
    "tuples": tuple((i, i) for i in range(40_000)),
}


def leaves(value):
    if isinstance(value, dict):
        return 1 + sum(map(leaves, value.values()))
    return 1 + sum(map(leaves, value)) if isinstance(value, (list, tuple)) else 1


@pytest.mark.parametrize("name", ANSWERS)
def test_long_answers_are_encoded_in_pieces(monkeypatch, name):
    """The encoder holds the interpreter lock to the end of each call."""
    sizes, encode = [], errors._encoder.encode
    monkeypatch.setattr(errors._encoder, "encode", lambda value: (sizes.append(leaves(value)), encode(value))[1])
    value = {"first": 1, name: ANSWERS[name]}
    assert json.loads(long_work.written(value).body) == json.loads(old_json(value))
    assert max(sizes) <= 2 * long_work.PIECE
    assert len(sizes) <= leaves(value) // 100 + 10


IDS = [300 + i % 100 for i in range(800)]
LONG_ANSWERS = {
    "/detokenize": {"tokens": IDS * 100},
    "/tokenize": {"content": "a b " * 5000, "with_pieces": True},
    "/v1/completions": {"prompt": IDS, "echo": True, "logprobs": 5, "max_tokens": 2},
    "/v1/completions stream": {"prompt": IDS, "echo": True, "logprobs": 5, "max_tokens": 2, "stream": True},
    "/completion": {"prompt": IDS, "n_predict": 2, "return_tokens": True},
    "/completion stream": {"prompt": IDS, "n_predict": 2, "stream": True},
    "/v1/embeddings": {"input": [[one] for one in IDS[:300]]},
    "/embedding": {"content": [[one] for one in IDS[:300]]},
    "/api/embed": {"input": [[one] for one in IDS[:300]]},
}


@pytest.mark.parametrize("name", LONG_ANSWERS)
def test_long_answers_are_made_in_other_threads(server, name, monkeypatch):
    monkeypatch.setattr(long_work, "SHORT", 500)
    where = []

    def noted(owner, attribute, is_long):
        original = getattr(owner, attribute)

        def wrapper(*given, **options):
            result = original(*given, **options)
            if is_long(given, result):
                where.append(threading.current_thread())
            return result

        monkeypatch.setattr(owner, attribute, wrapper)

    noted(errors._encoder, "encode", lambda _, text: len(text) > 4000)
    noted(Tokenizer, "decode", lambda given, _: len(given[1]) > 500)
    status, _, answer = server.post(name.partition(" ")[0], LONG_ANSWERS[name])
    assert status == 200, answer
    assert where
    assert server.thread not in where


@pytest.mark.parametrize("n", [3, 5000])
def test_conversations_are_read_in_other_threads_where_they_are_long(server, monkeypatch, n):
    from engine.serve.routes import messages, ollama, responses

    where, turns = [], [{"role": "user", "content": "a"}] * n

    def noted(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given: (where.append(threading.current_thread()), original(*given))[1]
        )

    noted(messages, "messages_of")
    noted(responses, "messages_of")
    noted(ollama, "with_ids")
    server.post("/v1/messages", {"messages": turns, "max_tokens": 1})
    server.post("/v1/messages/count_tokens", {"messages": turns})
    server.post("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * n}]})
    server.post("/v1/responses", {"input": turns, "max_output_tokens": 1})
    server.post("/api/chat", {"messages": turns, "stream": False, "options": {"num_predict": 1}})
    assert len(where) == 5
    assert (server.thread in where) == (n == 3)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt"),
        ("/v1/completions", {"prompt": [1.5, 2]}, "prompt"),
        ("/v1/completions", {"prompt": [True]}, "prompt"),
        ("/v1/completions", {"prompt": [None]}, "prompt"),
        ("/v1/completions", {"prompt": [{}]}, "prompt"),
        ("/v1/completions", {"prompt": [[1, True]]}, "prompt"),
        ("/v1/completions", {"prompt": ["a", [1, "a"]]}, "prompt"),
        ("/v1/completions", {"prompt": [[1], 2]}, "prompt"),
        ("/v1/completions", {"prompt": {}}, "prompt"),
        ("/v1/embeddings", {"input": [1, "a"]}, "input"),
        ("/v1/embeddings", {"input": [[1, True]]}, "input"),
        ("/v1/embeddings", {"input": [[]]}, "input"),
        ("/v1/embeddings", {"input": [[1]] * 5000}, "input"),
        ("/v1/rerank", {"query": "a", "documents": [1] * 5000}, "documents"),
        ("/v1/completions", {"prompt": "a", "logit_bias": [1]}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": [[]]}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": [[1, 2, 3]]}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": [[None, 2]]}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": [[True, 2]]}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": [[1, "2"]]}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1": True}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1": [2]}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1": None}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": "1"}, "logit_bias"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens[1]"),
    ],
)
def test_what_else_lists_hold_is_refused_by_name(server, path, body, param):
    status, _, answer = server.post(path, body)
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_texts_and_ids_may_be_mixed(server):
    ids = server.llm.tokenizer.encode("Once upon")
    body = {"prompt": ["Once upon", ids], "max_tokens": 4, "temperature": 0}
    first, second = server.post("/v1/completions", body)[2]["choices"]
    assert first["text"] == second["text"]


def searched(messages):
    """with_ids() as a search through a list."""
    made, waiting = [], []
    for number, message in enumerate(messages):
        one, calls = dict(message), message.get("tool_calls")
        if calls is not None:
            for index, call in enumerate(with_ids([{}] * number + [message])[-1]["tool_calls"]):
                waiting = waiting if index else []
                waiting.append((call["function"]["name"], call["id"]))
            one["tool_calls"] = with_ids([{}] * number + [message])[-1]["tool_calls"]
            waiting = waiting if calls else []
        elif one.get("role") == "tool":
            name = one.get("name")
            answered = next((call for call in waiting if name in (None, call[0])), None)
            if answered is not None:
                waiting.remove(answered)
                one |= {"name": one.get("name", answered[0]), "tool_call_id": answered[1]}
        made.append(one)
    return made


def test_results_belong_to_the_first_call_that_waits():
    rng = random.Random(5)
    for _ in range(300):
        messages = []
        for _ in range(rng.randrange(12)):
            if rng.random() < 0.3:
                calls = [{"function": {"name": rng.choice("ab")}} for _ in range(rng.randrange(6))]
                messages.append({"role": "assistant", "tool_calls": calls})
            else:
                name = rng.choice([{}, {"name": "a"}, {"name": "b"}, {"name": "c"}])
                messages.append({"role": "tool", "content": "x", **name})
        assert with_ids(messages) == searched(messages)


def test_a_result_with_a_name_that_is_no_text_belongs_to_no_call():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "a"}}]}
    for name in ([], {}, 3):
        assert "tool_call_id" not in with_ids([call, {"role": "tool", "name": name, "content": "x"}])[1]


def test_many_results_of_many_calls_take_no_search():
    """Each of 200 thousand results would otherwise be compared with 200 thousand calls: hours."""
    n = 200_000
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "a"}, "id": str(i)} for i in range(n)]}
    gc.collect()
    made = with_ids([calls, *([{"role": "tool", "name": "b"}] * n), {"role": "tool", "name": "a"}])
    assert made[-1]["tool_call_id"] == "0"
    assert "tool_call_id" not in made[-2]
