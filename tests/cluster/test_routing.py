"""What routing knows of requests and replicas, without Ray."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cluster.conversation import PIECE, conversation_of
from engine.cluster.prefixes import OPENING_SIZE, RUNNING_SIZE, SLACK, PrefixMap
from engine.serve.models.model_store import ModelNames, ModelSpec

ONE, TWO = ModelNames([ModelSpec("m")]), ModelNames([ModelSpec("m"), ModelSpec("n", aliases=("other",))])


def chat(*texts, models=ONE, **fields):
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]
    return conversation_of(json.dumps({"model": "m", "messages": messages, **fields}).encode(), models)


def text(prompt, models=ONE, **fields):
    return conversation_of(json.dumps({"prompt": prompt, **fields}).encode(), models)


def shared(one, other):
    return [a == b for a, b in zip(one.hashes, other.hashes, strict=False)]


def test_a_next_turn_begins_with_the_turn_before():
    first, second = chat("a", "b", "c"), chat("a", "b", "c", "d", "e")
    assert second.hashes[:3] == first.hashes
    assert second.sizes[:3] == first.sizes
    assert list(second.sizes) == sorted(second.sizes)


@pytest.mark.parametrize(
    "other",
    [chat("a", "x", "c"), chat("a", "b", "c", tools=[{"name": "t"}]), chat("a", "b")],
    ids=["text", "tools", "shorter"],
)
def test_what_differs_is_told_apart(other):
    assert other.hashes != chat("a", "b", "c").hashes


def test_models_are_told_apart_by_what_their_names_mean():
    assert chat("a", model="n") == chat("a")  # the only model has any name
    one, other = chat("a", models=TWO), chat("a", model="n", models=TWO)
    assert (one.model, other.model) == ("m", "n")
    assert one.hashes != other.hashes
    assert chat("a", model="other:latest", models=TWO) == other
    assert text("a", models=TWO).model == "m"
    assert chat("a", model="none of them", models=TWO).model == ""


def test_fields_that_the_prompt_does_not_have_make_no_difference():
    assert chat("a", temperature=0.5, stream=True) == chat("a")


def test_long_texts_share_their_pieces():
    common = "x" * (3 * PIECE)
    one, other = text(common + "y" * PIECE), text(common + "z" * PIECE)
    assert shared(one, other) == [True] * 3 + [False]
    ids = list(range(1000))
    assert shared(text(ids), text([*ids[:500], *ids])) == [True] * 7 + [False] * 9


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_no_body_is_too_strange(body):
    assert conversation_of(body, TWO).size >= 0


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["model", "messages", "prompt", "input", "system"]), x),
        max_leaves=8,
    )
)
def test_no_json_is_too_strange(value):
    assert conversation_of(json.dumps(value).encode(), TWO).size >= 0


def test_a_conversation_goes_to_the_replica_that_has_read_it():
    routes = PrefixMap(seed=1)
    routes.begin("1", chat("a" * 5000), "left")
    routes.end("1")
    for seed in range(20):
        routes._dice.seed(seed)
        assert routes.ranked(chat("a" * 5000, "b", "c"), ["right", "left"]) == ["left", "right"]


def test_unless_that_one_has_more_to_do_than_the_reading_takes():
    routes = PrefixMap(seed=1)
    known = chat("a" * 5000)
    routes.begin("1", known, "left")
    routes.end("1")
    n = 0
    while routes.ranked(known, ["right", "left"])[0] == "left":
        routes.begin(f"busy {n}", chat(f"{n}"), "left")
        n += 1
        assert n < 20
    assert n >= (SLACK + 5000) // (RUNNING_SIZE + 50)
    routes.begin("other", chat("other"), "right")
    assert routes.ranked(known, ["right", "left"])[0] == "left"
    routes.end("other")
    routes.end("busy 0")
    assert routes.ranked(known, ["right", "left"])[0] == "left"


def test_new_conversations_spread():
    routes = PrefixMap(seed=1)
    counts = {"a": 0, "b": 0, "c": 0}
    for n in range(30):
        conversation = chat(f"{n}" * 100)
        best = routes.ranked(conversation, counts)[0]
        routes.begin(str(n), conversation, best)
        counts[best] += 1
    assert max(counts.values()) - min(counts.values()) <= 1


def test_what_a_replica_was_given_is_forgotten_with_it_and_when_it_is_old():
    routes = PrefixMap(most=10, seed=1)
    old = chat("old" * 1000)
    routes.begin("1", old, "left")
    routes.end("1")
    for n in range(10):
        routes.begin(f"n{n}", chat(f"{n}"), "left")
        routes.end(f"n{n}")
    assert {routes.ranked(old, ["left", "right"])[0] for _ in range(40)} == {"left", "right"}
    routes.begin("2", old, "left")
    routes.keep(["right"])
    routes.end("2")  # told late: nothing is counted twice
    assert {routes.ranked(old, ["left", "right"])[0] for _ in range(40)} == {"left", "right"}
    routes.keep([])
    assert (routes._given, routes._running) == ({}, {})


def test_a_model_is_opened_again_only_where_much_waits_for_it():
    routes = PrefixMap(seed=1)
    m, n = chat("a", models=TWO), chat("a", model="n", models=TWO)
    routes.begin("1", m, "left")
    assert routes.ranked(n, ["left", "right"])[0] == "right"  # where fewer models are open
    routes.begin("2", n, "right")
    routes.end("1")
    routes.end("2")
    new = chat("b", models=TWO)
    k = 0
    while routes.ranked(new, ["right", "left"])[0] == "left":
        routes.begin(f"busy {k}", new, "left")
        k += 1
        assert k < 50
    assert k > OPENING_SIZE // RUNNING_SIZE
    routes.begin("3", new, "right")
    assert routes.ranked(new, ["right", "left"])[0] == "right"


def test_what_a_replica_says_of_its_models_counts_until_it_is_given_others():
    routes = PrefixMap(seed=1)
    m, n = chat("a" * 999, models=TWO), chat("a", model="n", models=TWO)
    routes.begin("1", m, "left")
    routes.tell_opened("left", ["n"])  # from before it opened m, which a request waits for
    assert routes.ranked(m, ["right", "left"])[0] == "left"
    routes.end("1")
    routes.tell_opened("left", ["n"])
    assert routes.ranked(m, ["right", "left"])[0] == "left"
    routes.tell_opened("left", [])  # both closed, for want of memory
    routes.tell_opened("right", ["m"])
    assert routes.ranked(m, ["right", "left"])[0] == "right"  # although left has read it
    assert routes.ranked(n, ["right", "left"])[0] == "left"
