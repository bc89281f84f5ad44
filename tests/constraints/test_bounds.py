"""Random schemas against the jsonschema package, and constraints that would cost too much."""

import json
import threading

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import LLM, Choice, Gbnf, InvalidRequestError, JsonSchema, Lark, Regex
from engine import SamplingParams as Params
from engine.constraints import ConstraintCompiler
from engine.errors import ConstraintError
from tests.support.masks import accepts


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", threads=2, max_sequences=4) as model:
        yield model


@pytest.fixture(scope="module")
def compiler(llm):
    return ConstraintCompiler(llm.tokenizer, llm.tokenizer.vocab_size, llm.tokenizer.eog_ids)


def bounded(low, high):
    return st.tuples(st.integers(-50, 50), st.integers(0, 30)).map(lambda pair: {low: pair[0], high: sum(pair)})


LEAVES = st.one_of(
    bounded("minimum", "maximum").map(lambda b: {"type": "integer", **b}),
    bounded("minimum", "maximum").map(lambda b: {"type": "number", **b}),
    bounded("exclusiveMinimum", "exclusiveMaximum").map(lambda b: {"type": "number", **b, "exclusiveMaximum": 99}),
    st.tuples(st.integers(0, 2), st.integers(2, 5)).map(
        lambda n: {"type": "string", "minLength": n[0], "maxLength": n[1]}
    ),
    st.sampled_from(["^[a-c]{1,3}$", "^x(y|é)?$", "[0-9]z$"]).map(lambda p: {"type": "string", "pattern": p}),
    st.lists(st.one_of(st.integers(-9, 9), st.text('ab"\\ü', max_size=3), st.none()), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "é\n"}, {"$ref": "#/$defs/leaf"}]),
)


def objects(inner):
    names = st.lists(st.sampled_from(["a", "b", 'q"', "ü"]), min_size=1, max_size=3, unique=True)
    return st.tuples(names, st.lists(inner, min_size=3, max_size=3), st.integers(0, 3)).map(
        lambda t: {
            "type": "object",
            "properties": dict(zip(t[0], t[1], strict=False)),
            "required": t[0][: t[2]],
            "additionalProperties": False,
        }
    )


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.tuples(inner, st.integers(0, 2)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + 1}
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda many: {"anyOf": many}),
    ),
    max_leaves=5,
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(SCHEMAS)
def test_texts_under_random_schemas_are_valid(llm, schema):
    whole = {**schema, "$defs": {"leaf": {"type": "integer", "minimum": 3, "maximum": 5}}}
    params = [
        Params(constraint=JsonSchema(whole), temperature=1.5, top_k=0, min_p=0, seed=seed, max_tokens=60)
        for seed in range(2)
    ]
    for result in llm.generate(["Once"] * 2, params):
        if result.finish_reason == "stop":
            jsonschema.validate(json.loads(result.text), whole)


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "maxItems": 1}
    return schema


def doubled(depth, step):
    defs = {f"d{i}": step({"$ref": f"#/$defs/d{i + 1}"}) for i in range(depth)}
    return {"$defs": {**defs, f"d{depth}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def two_properties(inner):
    return {"type": "object", "properties": {"a": inner, "b": inner}, "required": ["a"], "additionalProperties": False}


HEAVY = [
    JsonSchema(nested(300)),
    JsonSchema({"allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}]} for i in range(24)], "type": "integer"}),
    JsonSchema({"allOf": [{"multipleOf": 99991}, {"multipleOf": 99989}], "type": "integer"}),
    JsonSchema({"type": "object", "properties": {f"property{i}": {"type": "integer"} for i in range(20000)}}),
    Regex("(" * 500 + "a" + ")" * 500),
    Lark("start: " + "(" * 300 + "missing" + ")" * 300),
    Gbnf("root ::= " + "(" * 300),
]


@pytest.mark.parametrize("constraint", HEAVY, ids=range(len(HEAVY)))
def test_what_would_cost_too_much_is_refused_in_few_words(compiler, constraint):
    with pytest.raises(ConstraintError) as caught:
        compiler.mask(constraint)
    message = str(caught.value)
    assert len(message) < 400
    assert "\n" not in message
    assert not any(word in message for word in ("Traceback", "backtrace", ".rs:", 'File "'))


BEARABLE = [
    (JsonSchema(doubled(40, two_properties)), '{"a": {"a": {"a'),
    (JsonSchema(doubled(25, lambda inner: {"anyOf": [inner, inner]})), "12"),
    (JsonSchema({"enum": [f"value {i}" for i in range(20000)]}), '"value 19999"'),
    (JsonSchema({"type": "array", "items": {"type": "integer"}, "maxItems": 10**6}), "[1, 2]"),
    (Regex("(a|b)*a(a|b){25}"), "ab" * 20),
    (Regex("(x+x+)+y"), "x" * 60 + "y"),
    (Choice([f"option {i}" for i in range(10000)]), "option 9999"),
]


@pytest.mark.parametrize(("constraint", "text"), BEARABLE, ids=range(len(BEARABLE)))
def test_what_grows_without_bound_elsewhere_is_followed(compiler, llm, constraint, text):
    whole = not text.endswith('{"a')
    assert accepts(compiler, llm.tokenizer, constraint, text) == whole


def test_a_kept_grammar_does_not_wait_for_one_that_is_compiled(compiler, monkeypatch):
    compiler.mask(Regex("known"))
    inside, go_on = threading.Event(), threading.Event()
    compiled = ConstraintCompiler._compiled

    def slow(*arguments):
        inside.set()
        assert go_on.wait(60)
        return compiled(*arguments)

    monkeypatch.setattr(ConstraintCompiler, "_compiled", staticmethod(slow))
    thread = threading.Thread(target=lambda: compiler.mask(Regex("unknown")))
    thread.start()
    assert inside.wait(60)
    assert compiler.mask(Regex("known")) is not None
    go_on.set()
    thread.join()


def test_a_refused_constraint_leaves_no_request(llm):
    with pytest.raises(InvalidRequestError):
        llm.generate("Once", Params(constraint=JsonSchema(nested(300))))
    assert llm.active_requests == 0
