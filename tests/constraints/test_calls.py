"""Calls of tools that are constrained: drawn from a random model, read back by the parser, held against the schema."""

import pytest

from engine.text.answers.call_forms import FORMS, GENERIC
from tests.support.chats.call_worlds import WORLDS, beginning, check, draw, read, ready, rules_of


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("form", [*FORMS, GENERIC], ids=lambda form: form.name)
def test_required_calls_parse_and_fit_their_schema(form, kind):
    if form.opens and kind == "text":
        return  # headers are always made of control tokens
    tokenizer, compiler = WORLDS[kind]
    rules = ready(rules_of(form)[1], tokenizer)
    for seed in range(3):
        ids = draw(compiler.answer_mask(rules), tokenizer, seed, beginning(form, tokenizer))
        content, _, calls = read(rules, tokenizer, ids)
        assert calls, tokenizer.decode(ids, skip_special=False)
        assert not content.strip(), tokenizer.decode(ids, skip_special=False)
        check(calls)


@pytest.mark.parametrize("form", [*FORMS, GENERIC], ids=lambda form: form.name)
def test_a_named_tool_is_called_once(form):
    tokenizer, compiler = WORLDS["tokens"]
    rules = ready(rules_of(form, {"type": "function", "function": {"name": "look_up"}})[1], tokenizer)
    for seed in range(4):
        ids = draw(compiler.answer_mask(rules), tokenizer, seed, beginning(form, tokenizer))
        _, _, calls = read(rules, tokenizer, ids)
        assert [name for name, _ in calls] == ["look_up"]
        check(calls)


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("form", [*FORMS, GENERIC], ids=lambda form: form.name)
def test_a_call_once_begun_is_whole(form, kind):
    """With tool_choice auto: text comes first, the marker is drawn, the rest is constrained."""
    tokenizer, compiler = WORLDS[kind]
    rules = ready(rules_of(form, "auto", parallel=False)[1], tokenizer)
    begin = form.begin
    if form.name == "harmony":
        begin = "<|channel|>commentary to=functions.look_up <|constrain|>json<|message|>"
    elif form.body:
        begin += f"look_up{form.body}"
    elif not begin:
        begin = form.around[0] + form.call.partition("$name")[0] + "look_up" + form.call.partition("$name")[2][:1]
    words = "" if form.opens or not form.begin else "Well: "
    begun = tokenizer.encode(words + begin, add_special=False)
    for seed in range(4):
        ids = draw(compiler.answer_mask(rules), tokenizer, seed, begun)
        content, _, calls = read(rules, tokenizer, ids)
        assert len(calls) == 1, tokenizer.decode(ids, skip_special=False)
        assert content.strip() == words.strip()
        check(calls)
