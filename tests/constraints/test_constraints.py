"""Constraints on generated text, against JSON's and the schemas' own validators."""

import json
import re

import jsonschema
import numpy as np
import pytest

from engine import LLM, Choice, EngineError, Gbnf, InvalidRequestError, JsonObject, JsonSchema, Lark, Regex
from engine import SamplingParams as Params
from engine.constraints import ConstraintCompiler
from engine.constraints.costs import check_patterns
from engine.constraints.vocabulary import VocabularyView
from engine.sampling.sampler import sample
from engine.text import Tokenizer
from tests.support.masks import accepts, allows
from tests.support.vocabularies import spm_metadata

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WILD = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", threads=2, max_sequences=4) as model:
        yield model


@pytest.fixture(scope="module")
def compiler(llm):
    return ConstraintCompiler(llm.tokenizer, llm.tokenizer.vocab_size, llm.tokenizer.eog_ids)


@pytest.mark.shared
def test_schemas_accept_their_valid_instances_and_refuse_the_invalid_ones(shared_path, compiler, llm):
    lines = shared_path("json-schemas/schemas.jsonl").read_text(encoding="utf-8").splitlines()
    wrong, refused, counts = [], 0, {"valid": 0, "invalid": 0}
    for case in map(json.loads, lines):
        constraint = JsonSchema(case["schema"])
        try:
            compiler.mask(constraint)
        except InvalidRequestError:
            refused += 1
            continue
        for kind in ("valid", "invalid"):
            for instance in case[kind]:
                counts[kind] += 1
                text = json.dumps(instance, ensure_ascii=False)
                if accepts(compiler, llm.tokenizer, constraint, text) != (kind == "valid"):
                    wrong.append((case["name"], kind, text))
    assert not wrong
    assert refused <= 27
    assert counts == {"valid": 189, "invalid": 270}


@pytest.mark.shared
def test_wild_texts_under_every_schema_are_valid(shared_path, compiler, llm):
    """Tokens of random logits at temperature 2, with the forced ones taken as they are."""
    tokenizer, random, n_ended = llm.tokenizer, np.random.default_rng(0), 0
    params = Params(seed=0, **WILD)
    for case in map(json.loads, shared_path("json-schemas/schemas.jsonl").read_text(encoding="utf-8").splitlines()):
        try:
            mask = compiler.mask(JsonSchema(case["schema"]))
        except InvalidRequestError:
            continue
        ids = []
        while len(ids) < 150 and not mask.is_complete(ids):
            logits = random.normal(0, 3, tokenizer.vocab_size).astype(np.float32)
            logits[tokenizer.encode('"}],', add_special=False)] += 12  # so that texts come to an end
            token_id = sample(
                logits, params, history=(), output_index=len(ids), seed=7, allowed=mask.bits(ids)
            ).token_id
            if token_id in tokenizer.eog_ids:
                break
            ids.append(token_id)
            ids += mask.forced(ids)
        else:
            if not mask.is_complete(ids):
                continue  # cut off
        n_ended += 1
        jsonschema.validate(json.loads(tokenizer.decode(ids, continuation=True)), case["schema"])
    assert n_ended > 60


CASES = [
    (JsonSchema(PERSON), lambda text: jsonschema.validate(json.loads(text), PERSON)),
    (JsonSchema(json.dumps({"type": ["integer", "null"]})), lambda text: int(json.loads(text) or 0)),
    (JsonObject(), lambda text: dict(json.loads(text))),
    (Regex(r"[a-c]{2,5}-\d+(x|é)"), lambda text: re.fullmatch(r"[a-c]{2,5}-\d+(x|é)", text)[0]),
    (Choice(["yes", "no", 'a "quoted"\n\\choice']), lambda text: ["yes", "no", 'a "quoted"\n\\choice'].index(text) + 1),
    (Lark('start: "<" /[a-z]{1,9}/ ">"'), lambda text: re.fullmatch("<[a-z]{1,9}>", text)[0]),
    (
        Gbnf('root ::= item ("," item)*\nitem ::= [0-9]+ | "(" root ")"'),
        lambda text: (re.fullmatch(r"[0-9,()]+", text)[0] and text.count("(") == text.count(")")) or 1 // 0,
    ),
]


@pytest.mark.parametrize(
    ("constraint", "check"), CASES, ids=[type(c).__name__ + str(i) for i, (c, _) in enumerate(CASES)]
)
def test_wild_texts_obey(llm, constraint, check):
    params = [Params(constraint=constraint, seed=seed, max_tokens=120, **WILD) for seed in range(12)]
    ended = [r for r in llm.generate(["Once"] * 12, params) if r.finish_reason == "stop"]
    for result in ended:
        check(result.text)
    assert ended or isinstance(constraint, JsonObject)


def test_the_same_text_alone_in_a_batch_and_behind_a_preemption(llm):
    def params(seed):
        return Params(constraint=JsonSchema(PERSON), seed=seed, temperature=1.0, max_tokens=60)

    alone = [llm.generate("Once", params(seed)).text for seed in range(4)]
    assert len(set(alone)) > 1
    assert [
        one.text
        for one in llm.generate(
            "Once", Params(constraint=JsonSchema(PERSON), seed=0, n=4, temperature=1.0, max_tokens=60)
        ).samples
    ] == alone
    with LLM(device="cpu", threads=2, max_sequences=4, context_length=128, cache_tokens=128) as small:
        assert [r.text for r in small.generate(["Once"] * 4, [params(seed) for seed in range(4)])] == alone


def test_control_tokens_are_drawn_only_where_the_text_may_end(compiler, llm):
    tokenizer = llm.tokenizer
    mask = compiler.mask(Regex("(ab)+"))
    controls = [i for i in range(tokenizer.vocab_size) if tokenizer.is_control(i)]
    ids = tokenizer.encode("abab", add_special=False)
    first, last = mask.bits([]).copy(), mask.bits(ids)
    assert controls
    assert not any(allows(first, i) for i in controls)
    assert {i for i in controls if allows(last, i)} == set(tokenizer.eog_ids)


def test_ends_that_are_ignored_still_end_a_text_that_is_whole(llm):
    result = llm.generate("Once", Params(constraint=Choice(["yes"]), ignore_eos=True, max_tokens=20))
    assert (result.text, result.finish_reason) == ("yes", "stop")


def test_a_text_cut_short_says_so(llm):
    result = llm.generate("Once", Params(constraint=JsonSchema(PERSON), max_tokens=3, seed=1))
    assert result.finish_reason == "length"
    assert '{"name":'.startswith(result.text.replace(" ", "")[:8])


REFUSED = [
    (Regex("("), "unclosed group"),
    (Lark("start: missing"), "missing"),
    (Gbnf('root ::= "a" ('), "Expected"),
    (JsonSchema({"type": "objec"}), "objec"),
    (JsonSchema({"type": "object", "not": {"required": ["a"]}}), "not"),
    (JsonSchema({"not": {}, "x-guidance": {"lenient": True}}), "not"),
    (JsonSchema({"type": "integer", "minimum": 2, "maximum": 1}), "minimum|unsatisfiable|greater"),
    # These would take minutes, and gigabytes of memory, until the library refuses them.
    (Regex("(a|b)*" * 50_000), "300000 characters; allowed: at most 50000"),
    (Lark("start: /" + "(a|b)*" * 50_000 + "/"), "300009 characters"),
    (Gbnf("root ::= " + '("a"|"b")* ' * 50_000), "characters"),
    (JsonSchema({"anyOf": [{"patternProperties": {"(a|b)*" * 6_000: {"pattern": "a" * 20_000}}}]}), "56000 characters"),
]


@pytest.mark.parametrize(("constraint", "reason"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_done_is_refused_before_anything_runs(llm, constraint, reason):
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        llm.generate("Once", Params(constraint=constraint, max_tokens=1))
    assert "\n" not in str(caught.value).strip() or isinstance(constraint, (Regex, Lark))
    assert llm.active_requests == 0


def test_patterns_of_tools_count_together():
    """Each alone would pass; what only looks like a pattern counts as well."""
    schema = json.dumps({"properties": {"pattern": {"type": "string"}, "a": {"pattern": "x" * 20_000}}})
    check_patterns([schema] * 2)
    with pytest.raises(InvalidRequestError, match="have 60000 characters; allowed: at most 50000"):
        check_patterns([schema] * 3)


@pytest.mark.parametrize("bad", ["", 7, None, " "])
def test_descriptions_are_checked(bad):
    for kind in (Regex, Lark, Gbnf):
        with pytest.raises(InvalidRequestError):
            kind(bad)
    for kind in (JsonSchema, Choice):
        with pytest.raises(InvalidRequestError):
            kind(bad)
    with pytest.raises(InvalidRequestError, match="Regex"):
        Params(constraint="json")


def test_settings_with_constraints_are_values():
    one, two = (Params(constraint=JsonSchema(schema)) for schema in (PERSON, json.dumps(PERSON, ensure_ascii=False)))
    assert one == two
    assert hash(one) == hash(two)


def test_logprobs_are_of_the_masked_distribution_or_of_the_free_one(llm):
    def first(**options):
        params = Params(constraint=Choice(["a", "b"]), max_tokens=1, seed=3, logprobs=2, **options)
        return llm.generate("Once", params).logprobs[0]

    masked, free = first(), first(free_logprobs=True)
    assert masked.token_id == free.token_id
    assert sum(np.exp(p) for _, p in masked.top_logprobs) == pytest.approx(1, abs=1e-5)
    assert {llm.tokenizer.token_text(i) for i, _ in masked.top_logprobs} == {"a", "b"}
    assert free.logprob < masked.logprob


def test_a_mask_is_found_again_after_an_exception_inside_a_move(compiler, llm):
    ids = llm.tokenizer.encode('{"name": "x"', add_special=False)
    mask, plain = compiler.mask(JsonSchema(PERSON)), compiler.mask(JsonSchema(PERSON))
    for done in range(len(ids) + 1):
        wanted = plain.bits(ids[:done]).copy()
        mask.bits(ids[: max(done - 1, 0)])
        mask._is_moving = True  # as an exception leaves it between the library's step and the count of it
        np.testing.assert_array_equal(mask.bits(ids[:done]), wanted)


def test_a_constraint_that_fails_ends_its_own_request_alone(llm, monkeypatch):
    from engine.constraints.matcher import GrammarMask

    inside = GrammarMask.bits

    def bits(self, output_ids):
        if len(output_ids) >= 2:  # a text with forced tokens is not asked about at every length
            raise EngineError("the constraint of this request cannot go on: test")
        return inside(self, output_ids)

    monkeypatch.setattr(GrammarMask, "bits", bits)
    free = Params(max_tokens=8, temperature=0)
    with pytest.raises(EngineError, match="cannot go on"):
        llm.generate(["Once", "One day"], [Params(constraint=JsonSchema(PERSON), max_tokens=8), free])
    streams = [llm.stream("Once", Params(constraint=JsonSchema(PERSON), max_tokens=8)), llm.stream("One day", free)]
    text = "".join(chunk.text for chunk in streams[1])
    with pytest.raises(EngineError, match="cannot go on"):
        list(streams[0])
    monkeypatch.undo()
    assert text == llm.generate("One day", free).text


def test_masked_tokens_are_never_drawn():
    logits = np.linspace(5, -5, 100).astype(np.float32)
    allowed = np.zeros(4, np.uint32)
    allowed[[0, 3]] = 1 << 5, 1 << 3  # tokens 5 and 99
    drawn = {
        sample(logits, Params(**WILD), history=(), output_index=i, seed=1, allowed=allowed).token_id for i in range(400)
    }
    assert drawn == {5, 99}
    with pytest.raises(InvalidRequestError, match="no probability"):
        sample(
            np.where(np.arange(100) == 5, -np.inf, np.float32(0)),
            Params(),
            history=(),
            output_index=0,
            seed=1,
            allowed=np.array([32, 0, 0, 0], np.uint32),
        )


def test_a_vocabulary_without_end_tokens_ends_where_nothing_can_follow():
    tokenizer = Tokenizer.from_metadata(spm_metadata())
    compiler = ConstraintCompiler(tokenizer, tokenizer.vocab_size + 3, ())
    mask = compiler.mask(Regex("[a-z]{2}"))
    ids = []
    while not mask.is_complete(ids):
        bits = mask.bits(ids)
        allowed = [i for i in range(tokenizer.vocab_size + 3) if allows(bits, i)]
        ids.append(allowed[0])
    assert len(tokenizer.decode(ids)) == 2
    view = VocabularyView(tokenizer, tokenizer.vocab_size, 0, ())
    for text in ("ab", " the", 'x"y'):
        assert b"".join(tokenizer.token_bytes(i) for i in view(text)).decode() in (text, "")
