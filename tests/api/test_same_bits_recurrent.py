"""Models with recurrent layers behind the public calls: the same bits whatever runs beside them and is reused.

On the GPU the same, where prompts and generated tokens have kernels of their own each.
"""

from dataclasses import replace
from functools import partial

import pytest

from engine import LLM, SamplingParams
from engine.config import PAGE
from engine.errors import InvalidRequestError
from engine.gguf.quants import GGMLType
from tests.support.injection import interrupted
from tests.support.models.hybrid_models import REUSED, tiny_hybrid
from tests.support.models.recurrent_models import LAST_BORDERS, PROMPTS, tiny_mamba


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_mamba(
        tmp_path_factory.mktemp("mamba") / "tiny.gguf", weight_type=GGMLType.Q8_0, dt_rank=32, selection=1.0
    )


def params(index, **options):
    temperature = 0.0 if index % 2 else 0.9
    return SamplingParams(max_tokens=30, temperature=temperature, seed=index, ignore_eos=True, logprobs=3, **options)


def outcome(result):
    return result.token_ids, result.logprobs


@pytest.fixture(
    scope="module",
    params=[
        ("cpu", "mamba"),
        pytest.param(("cuda", "mamba"), marks=pytest.mark.gpu),
        *(("cpu", family) for family in REUSED),
        *(pytest.param(("cuda", family), marks=pytest.mark.gpu) for family in REUSED),
    ],
    ids="-".join,
)
def opened(request, path, tmp_path_factory):
    """Opens a model on a device; on a GPU so that a row's bits depend on its own tokens alone."""
    device, family = request.param
    if family != "mamba":
        path = tiny_hybrid(tmp_path_factory.mktemp(family) / "tiny.gguf", family)
    return partial(LLM, path, device=device, deterministic=device == "cuda", context_length=256)


@pytest.fixture(scope="module")
def alone(opened):
    """Every prompt on its own, nothing reused."""
    with opened(max_sequences=1, prefix_cache=False) as llm:
        return [outcome(llm.generate(prompt, params(i))) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"max_sequences": 8}, id="one batch"),
        pytest.param({"max_sequences": 3, "prefill_chunk": 7, "checkpoint_spacing": PAGE}, id="small pieces"),
        pytest.param({"max_sequences": 4, "cache_tokens": 256, "prefix_cache": False}, id="too few pages"),
        pytest.param({"max_sequences": 1, "cache_tokens": 2048}, id="one after another"),
        pytest.param({"max_sequences": 2, "checkpoints": 0}, id="no checkpoints"),
    ],
)
def test_the_same_bits(opened, alone, settings):
    with opened(**settings) as llm:
        saved = []
        with llm.exclusive_runner() as runner:
            save = runner.states.save
            runner.states.save = lambda slot, place: saved.append(slot) or save(slot, place)
        every = [params(i) for i in range(len(PROMPTS))]
        for _ in range(2):  # the second time everything is in the cache
            results = llm.generate(PROMPTS, every)
            assert [outcome(result) for result in results] == alone
        if settings.get("cache_tokens") == 256:
            assert saved, "no sequence was preempted: this tests nothing"
        reused = [result.stats.cached_tokens for result in results]
        keeps = settings.get("prefix_cache", True) and settings.get("checkpoints") != 0
        assert reused == (LAST_BORDERS if keeps else [0] * len(PROMPTS))


def test_samples_share_the_prompt(opened, alone):
    with opened(max_sequences=8) as llm:
        whole = llm.generate(PROMPTS[2], params(2, n=3))
    assert outcome(whole.samples[0]) == alone[2]
    assert [sample.stats.cached_tokens for sample in whole.samples] == [0, *[LAST_BORDERS[2]] * 2]


def test_sequences_that_change_slots(opened, alone, monkeypatch):
    monkeypatch.setattr("engine.scheduling.slots.PATIENCE", 0)
    lengths = (30, 9, 30, 12, 30)
    with opened(max_sequences=8) as llm:
        moved = []
        with llm.exclusive_runner() as runner:
            move = runner.states.move
            runner.states.move = lambda *given: moved.append(given) or move(*given)
        every = [replace(params(i), max_tokens=n) for i, n in enumerate(lengths)]
        results = llm.generate(PROMPTS, every)
    for result, whole, n in zip(results, alone, lengths, strict=True):
        assert outcome(result) == tuple(part[:n] for part in whole)
    assert moved


def test_scores_and_logits(opened, alone):
    """What is computed outside the step loop, and what needs every row, goes through the same states."""
    wanted = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=2)
    with opened(max_sequences=2) as llm:
        llm.generate(PROMPTS[2], SamplingParams(max_tokens=1))
        first = llm.generate(PROMPTS[2], wanted)
        logits = llm.logits(PROMPTS[1])
        assert int(logits[-1].argmax()) == alone[1][0][0]
        assert outcome(llm.generate(PROMPTS[1], params(1))) == alone[1]
    with opened(prefix_cache=False, prefill_chunk=9) as llm:
        assert llm.generate(PROMPTS[2], wanted).prompt_logprobs == first.prompt_logprobs


@pytest.mark.parametrize("at", [40, 133, 207, 311, 430, 622, 845])
def test_an_interrupt_anywhere_changes_nothing(opened, alone, at):
    with opened(max_sequences=4, prefill_chunk=50) as llm:
        streams = [llm.stream(prompt, params(i)) for i, prompt in enumerate(PROMPTS[:3])]
        results, interruptions = interrupted([stream.result for stream in streams], at, 97)
    assert interruptions > 3
    assert [outcome(result) for result in results] == alone[:3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint_spacing": 100}, "checkpoint_spacing is 100; allowed: multiples of 64"),
        ({"checkpoint_spacing": 0}, "checkpoint_spacing is 0"),
        ({"activation_bits": 4}, "activation_bits is 4; allowed: 8 or 16"),
        ({"checkpoints": -1}, "checkpoints is -1; allowed: a whole number of at least 0"),
    ],
)
def test_settings_out_of_range(path, options, words):
    with pytest.raises(InvalidRequestError, match=words):
        LLM(path, device="cpu", **options)
