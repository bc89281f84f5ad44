"""What a caller does with a result changes nothing in the engine, in other samples or in later results."""

from dataclasses import fields, is_dataclass

import pytest

from engine import LLM, SamplingParams

PROMPT = "Once upon a time there was a"
THREE = SamplingParams(max_tokens=12, temperature=0.9, seed=5, n=3, logprobs=1, prompt_logprobs=1)


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", threads=1, max_sequences=1) as model:  # one slot: samples start after one another
        yield model


def mutable_parts(value, seen=None):
    """Every list, dict and set in a result, by identity."""
    seen = {} if seen is None else seen
    if isinstance(value, (list, dict, set)):
        seen[id(value)] = value
    if isinstance(value, (list, tuple, set)):
        for item in value:
            mutable_parts(item, seen)
    elif is_dataclass(value):
        for field in fields(value):
            mutable_parts(getattr(value, field.name), seen)
    return seen


def spoil(value):
    """Change everything in a result that can be changed."""
    for part in mutable_parts(value).values():
        part.append(-1) if isinstance(part, list) else None
        part.clear()


def test_changed_results_do_not_reach_samples_that_run(llm):
    want = [sample.token_ids for sample in llm.generate(PROMPT, THREE).samples]
    got = []
    streams = llm.sample_streams(PROMPT, THREE)
    ids = llm.tokenizer.encode(PROMPT)
    for stream in streams:
        result = stream.result()
        assert result.prompt_token_ids == ids
        got.append(list(result.token_ids))
        again = stream.result()
        spoil(result)
        assert again.token_ids == stream.result().token_ids == got[-1]
        assert len(stream.result().logprobs) == 12
        assert len(stream.result().prompt_logprobs) == len(ids)
    assert got == want


def test_a_closed_streams_result_is_not_its_siblings(llm):
    first, *rest = llm.sample_streams(PROMPT, THREE)
    next(first)
    first.close()
    spoil(first.result())
    want = [sample.token_ids for sample in llm.generate(PROMPT, THREE).samples]
    assert [stream.result().token_ids for stream in rest] == want[1:]


def test_samples_of_one_result_share_no_lists(llm):
    result = llm.generate(PROMPT, THREE)
    parts = [part for one in (result, *result.samples) for part in (one.token_ids, one.prompt_token_ids, one.logprobs)]
    assert len({id(part) for part in parts}) == len(parts) == 12
    spoil(result.samples[0])
    assert len(result.token_ids) == 12


def test_what_a_caller_gave_is_not_kept(llm):
    ids = llm.tokenizer.encode(PROMPT)
    want = llm.generate(PROMPT, THREE).token_ids
    streams = llm.sample_streams(ids, THREE)
    request_id = llm.add_request(ids, SamplingParams(max_tokens=12, temperature=0.9, seed=5))
    ids[:] = [1]
    assert streams[0].result().token_ids == want
    tokens = []
    while len(tokens) < 12:
        for chunk in llm.step():
            assert chunk.request_id == request_id
            tokens += chunk.token_ids
            assert not mutable_parts(chunk)
    assert tokens == want


def test_public_attributes_cannot_be_changed(llm):
    with pytest.raises(TypeError):
        llm.tokenizer.special_ids["bos"] = 5
    assert isinstance(llm.tokenizer.eog_ids, frozenset)
    encoded = llm.tokenizer.encode(PROMPT)
    encoded.clear()
    assert llm.tokenizer.encode(PROMPT)
    rows = llm.logits(PROMPT)
    before = rows.copy()
    rows[:] = 0
    assert (llm.logits(PROMPT) == before).all()
