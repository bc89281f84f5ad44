"""A constraint and tools in one request: the answer is a text that the constraint allows, or calls of tools."""

import json
from types import SimpleNamespace

import jsonschema
import pytest

from engine import InvalidRequestError, JsonSchema
from engine.sampling.opening import Opening, Thought
from engine.text.answers.call_forms import FORMS, GENERIC
from engine.text.answers.parser import AnswerParser
from tests.support.chats.call_worlds import TOOLS, WORLDS, check, draw, read, ready, rules_of
from tests.support.masks import allows

NOTE = {
    "type": "object",
    "properties": {"note": {"type": "string", "maxLength": 30}, "n": {"enum": [1, 2]}},
    "required": ["note", "n"],
    "additionalProperties": False,
}
MARKED = [form for form in (*FORMS, GENERIC) if form.begin and not form.opens]
THINKING = Opening(thoughts=(Thought("<think>", ("</think>",)),))


@pytest.mark.parametrize("opening", [None, THINKING], ids=["text first", "thoughts"])
@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("form", MARKED, ids=lambda form: form.name)
def test_the_answer_is_either(form, kind, opening):
    tokenizer, compiler = WORLDS[kind]
    rules = ready(rules_of(form, "auto")[1], tokenizer)
    reader = SimpleNamespace(
        parser=lambda: AnswerParser(rules.markers, "", rules.types, verbatim=True), shown_ids=rules.shown_ids
    )
    before = tokenizer.encode("<think>so</think>", add_special=False) if opening else []
    for begin in ("{", form.begin):
        begun = [*before, *tokenizer.encode(begin, add_special=False)]
        for seed in range(2):
            ids = draw(compiler.mask(JsonSchema(NOTE), opening, rules.calls), tokenizer, seed, begun)
            content, reasoning, calls = read(reader, tokenizer, ids)
            assert reasoning == ("so" if opening else "")
            assert bool(calls) == (begin != "{"), tokenizer.decode(ids, skip_special=False)
            if calls:
                assert not content.strip()
                check(calls)
            else:
                jsonschema.validate(json.loads(content), NOTE)


def test_nothing_else_may_begin_the_answer():
    tokenizer, compiler = WORLDS["tokens"]
    form = next(form for form in MARKED if form.begin == "<tool_call>")
    mask = compiler.mask(JsonSchema(NOTE), None, rules_of(form, "auto")[1].calls)
    first = mask.bits([])
    texts = {tokenizer.token_text(i) for i in range(tokenizer.vocab_size) if allows(first, i)}
    assert texts == {"{", "<tool_call>", " ", "\t", "\n", "\r"}


def test_what_cannot_be_told_apart_is_refused():
    _, compiler = WORLDS["tokens"]
    for form in {*FORMS, GENERIC} - set(MARKED):
        with pytest.raises(InvalidRequestError, match="no marker of their own"):
            compiler.mask(JsonSchema(NOTE), None, rules_of(form, "auto")[1].calls)
    broken = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
    with pytest.raises(InvalidRequestError, match="'f' cannot be held"):
        compiler.mask(JsonSchema(NOTE), None, rules_of(MARKED[0], "auto", tools=[*TOOLS, broken])[1].calls)
