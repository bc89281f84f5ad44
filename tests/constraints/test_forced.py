"""Tokens that a constraint forces are fed together: the same as one at a time, in fewer steps."""

from contextlib import contextmanager

import pytest

from engine import LLM, Choice, JsonSchema, Regex
from engine import SamplingParams as Params
from engine.constraints import ConstraintCompiler
from engine.gguf.quants import GGMLType
from engine.text.answers.call_forms import FORMS, GENERIC
from tests.support.chats.call_worlds import WORLDS, allowed, beginning, ready, rules_of
from tests.support.models.recurrent_models import tiny_mamba

RECORD = {
    "type": "object",
    "properties": {
        "first_of_the_names": {"enum": ["Ann", "Bob"]},
        "number_of_days": {"type": "integer", "minimum": 0, "maximum": 99},
        "is_it_true_or_false": {"type": "boolean"},
    },
    "required": ["first_of_the_names", "number_of_days", "is_it_true_or_false"],
    "additionalProperties": False,
}
CONSTRAINTS = [
    JsonSchema(RECORD),
    Regex("(red|green)-and-then-something-blue[0-9]{2}, over"),
    Choice(["It was the best of times", "Nothing there but a cat"]),
]
LONG = "very " * 300
NEVER = 1 << 30


@contextmanager
def together(llm, shortest):
    """Runs with so many tokens as the shortest piece; gives the number of steps of the runner."""
    with llm.exclusive_runner() as runner:
        before, step, steps = runner.shortest_piece, runner.step, []
        runner.shortest_piece = shortest
        runner.step = lambda work: steps.append(len(work)) or step(work)
    try:
        yield steps
    finally:
        with llm.exclusive_runner() as runner:
            runner.shortest_piece = before
            del runner.step


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", threads=2, max_sequences=4) as model:
        yield model


def params(constraint, seed, **options):
    options = {"temperature": 1.5, "top_k": 0, "logprobs": 3, "max_tokens": 80, "repetition_penalty": 1.1} | options
    return Params(constraint=constraint, seed=seed, **options)


def outcome(result):
    return result.text, result.token_ids, result.finish_reason, result.logprobs


def singly(llm, requests):
    with together(llm, NEVER) as steps:
        found = [outcome(llm.generate("Once", one)) for one in requests]
    return found, len(steps)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda one: type(one).__name__)
def test_the_same_tokens_and_log_probabilities_in_fewer_steps(llm, constraint):
    requests = [params(constraint, seed) for seed in range(4)]
    expected, most = singly(llm, requests)
    with together(llm, 2) as steps:
        assert [outcome(llm.generate("Once", one)) for one in requests] == expected
        alone = len(steps)
        assert [outcome(one) for one in llm.generate(["Once"] * 4, requests)] == expected
    assert alone < 0.75 * most
    assert len({text for text, *_ in expected}) > 1


def test_samples_preemption_and_streams(llm):
    requests = [params(JsonSchema(RECORD), seed) for seed in range(4)]
    expected, _ = singly(llm, requests)
    whole = llm.generate("Once", params(JsonSchema(RECORD), 0, n=4))
    assert [outcome(one) for one in whole.samples] == expected
    streams = [llm.stream("Once", one) for one in requests]
    for stream, (text, ids, *_) in zip(streams, expected, strict=True):
        chunks = list(stream)
        assert "".join(chunk.text for chunk in chunks) == text
        assert [token for chunk in chunks for token in chunk.token_ids] == ids
    with LLM(device="cpu", threads=2, max_sequences=4, context_length=128, cache_tokens=128) as small:
        assert [outcome(one) for one in small.generate(["Once"] * 4, requests)] == expected


def test_every_limit_cuts_at_the_same_token(llm):
    constraint = Regex("so-it-was-said(.|\n){2} and-it-was-good")
    n = len(singly(llm, [params(constraint, 3)])[0][0][1])
    requests = [params(constraint, 3, max_tokens=limit) for limit in range(1, n + 2)]
    requests += [params(constraint, 3, stop=stop) for stop in (["it-was"], ["aid"], ["-good"], ["-was-g", "was-s"])]
    expected, _ = singly(llm, requests)
    assert [outcome(one) for one in llm.generate(["Once"] * len(requests), requests)] == expected
    assert [reason for *_, reason, _ in expected[n - 1 :]] == ["stop"] * 6
    stops = {expected[n][1][index] for index in (1, 4, n - 1)}
    requests = [params(constraint, 3, stop_token_ids=[token_id]) for token_id in stops]
    assert [outcome(llm.generate("Once", one)) for one in requests] == singly(llm, requests)[0]


def test_a_long_run_is_cut_into_pieces_beside_streams(llm):
    """A piece is bounded; a stream beside it gets a token in every step."""
    expected, _ = singly(llm, [params(None, 5, max_tokens=30)])
    ids = llm.tokenizer.encode(LONG + "end", add_special=False)
    long = Params(constraint=Choice([LONG + "end"]), max_tokens=len(ids) + 5)
    with together(llm, 2) as steps:
        free, bound = llm.generate(["Once", "Once"], [params(None, 5, max_tokens=30), long])
    assert outcome(free) == expected[0]
    assert (bound.text, bound.finish_reason) == (LONG + "end", "stop")
    assert 30 <= len(steps) < len(ids) / 4


def test_free_log_probabilities_are_those_of_every_row(llm):
    requests = [params(constraint, 2, free_logprobs=True) for constraint in CONSTRAINTS]
    expected, most = singly(llm, requests)
    with together(llm, 2) as steps:
        assert [outcome(llm.generate("Once", one)) for one in requests] == expected
    assert len(steps) == most
    assert all(one.logprob < 0 for one in expected[0][3])


def test_recurrent_layers(tmp_path):
    """A piece moves the state by one place, whatever its length; the same bits as one token at a time."""
    path = tiny_mamba(tmp_path / "tiny.gguf", weight_type=GGMLType.Q8_0, dt_rank=32, selection=1.0, context_length=256)
    requests = [params(JsonSchema(RECORD), seed, max_tokens=140) for seed in range(3)]
    with LLM(path, device="cpu", threads=2, max_sequences=3) as llm:
        expected, most = singly(llm, requests)
        with together(llm, 2) as steps:
            assert [outcome(one) for one in llm.generate(["Once"] * 3, requests)] == expected
        assert len(steps) < most / 3
    with LLM(path, device="cpu", threads=2, max_sequences=3, cache_tokens=256, prefill_chunk=5) as small:
        assert [outcome(one) for one in small.generate(["Once"] * 3, requests)] == expected


def test_forced_tokens_are_those_that_the_tokenizer_gives(llm):
    compiler = ConstraintCompiler(llm.tokenizer, llm.tokenizer.vocab_size, llm.tokenizer.eog_ids)
    text = "once_upon a-time, there was(x)"
    mask = compiler.mask(Choice([text]))
    forced = list(mask.forced([]))
    assert llm.tokenizer.decode(forced) == text
    assert forced == llm.tokenizer.encode("\n" + text, add_special=False)[-len(forced) :]
    for done in range(len(forced)):
        bits = mask.bits(forced[:done])
        assert [i for i in range(llm.tokenizer.vocab_size) if bits[i // 32] >> (i % 32) & 1] == [forced[done]]
    assert mask.is_complete(forced)
    assert not mask.forced(forced)


@pytest.mark.parametrize("form", [*FORMS, GENERIC], ids=lambda form: form.name)
def test_forced_tokens_of_calls_and_of_ended_thoughts(form):
    """Each is the only one that the mask allows when the ones before it were drawn."""
    tokenizer, compiler = WORLDS["tokens"]
    calls = ready(rules_of(form, parallel=False)[1], tokenizer)
    thoughts = ready(
        rules_of(form, "auto", prompt="<think>", max_reasoning=3, reasoning_end="</think>\n")[1], tokenizer
    )
    n_forced = 0
    for rules, begun in ((calls, beginning(form, tokenizer)), (thoughts, [97, 98, 99])):
        if form.opens and rules is thoughts:
            continue  # thoughts are messages there
        mask, ids = compiler.answer_mask(rules), list(begun)
        while len(ids) < 80 and not mask.is_complete(ids):
            for token_id in mask.forced(ids):
                assert allowed(mask.bits(ids), tokenizer.vocab_size) == [token_id]
                ids.append(token_id)
                n_forced += 1
            if not mask.is_complete(ids):
                ids.append(allowed(mask.bits(ids), tokenizer.vocab_size)[0])
    assert n_forced > 5 or form.opens  # there the first message may be a thought of any length
