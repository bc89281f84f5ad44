"""A request's tokens and log-probabilities on the CPU: the same bits whatever runs beside it and however it is fed."""

import pytest

from engine import LLM, SamplingParams

SHARED = [5 + 7 * i % 900 for i in range(90)]
PROMPTS = [SHARED, [*SHARED[:70], *range(20, 45)], [*SHARED, *range(300, 340)], list(range(60, 63)), SHARED[:64]]


def params(index, **options):
    temperature = 0.0 if index % 2 else 0.9
    return SamplingParams(max_tokens=40, temperature=temperature, seed=index, ignore_eos=True, logprobs=3, **options)


def outcome(result):
    return result.token_ids, result.logprobs


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def kv_type(request):
    return request.param


@pytest.fixture(scope="module")
def alone(kv_type):
    """Every prompt on its own, nothing reused."""
    with LLM(device="cpu", context_length=256, kv_type=kv_type, max_sequences=1, prefix_cache=False) as llm:
        return [outcome(llm.generate(prompt, params(i))) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"max_sequences": 8}, id="one batch, prefixes reused"),
        pytest.param({"max_sequences": 8, "prefix_cache": False}, id="one batch"),
        pytest.param({"max_sequences": 3, "prefill_chunk": 7}, id="small pieces"),
        pytest.param({"max_sequences": 4, "cache_tokens": 256, "prefix_cache": False}, id="too few pages"),
        pytest.param({"max_sequences": 1, "cache_tokens": 2048}, id="one after another, prefixes reused"),
    ],
)
def test_the_same_bits(alone, kv_type, settings):
    with LLM(device="cpu", context_length=256, kv_type=kv_type, **settings) as llm:
        saved = []
        with llm.exclusive_runner() as runner:
            save = runner.save_pages
            runner.save_pages = lambda pages: saved.append(len(pages)) or save(pages)
        every = [params(i) for i in range(len(PROMPTS))]
        for _ in range(2):  # the second time everything is in the cache
            results = llm.generate(PROMPTS, every)
            assert [outcome(result) for result in results] == alone
        if settings.get("cache_tokens") == 256:
            assert saved, "nobody was preempted: this tests nothing"
        reused = [result.stats.cached_tokens for result in results]
        if settings.get("prefix_cache", True):
            assert reused == [len(prompt) - 1 for prompt in PROMPTS]
        else:
            assert reused == [0] * len(PROMPTS)


def test_samples_are_what_their_seeds_give_alone(alone, kv_type):
    with LLM(device="cpu", context_length=256, kv_type=kv_type, max_sequences=8) as llm:
        whole = llm.generate(PROMPTS[2], params(2, n=3))
        singles = [
            llm.generate(
                PROMPTS[2], SamplingParams(max_tokens=40, temperature=0.9, seed=2 + i, ignore_eos=True, logprobs=3)
            )
            for i in range(3)
        ]
    assert [outcome(sample) for sample in whole.samples] == [outcome(single) for single in singles]
    assert outcome(whole.samples[0]) == alone[2]
    assert [sample.stats.cached_tokens for sample in whole.samples] == [0, *[len(PROMPTS[2]) - 1] * 2]


def test_scores_do_not_depend_on_what_is_cached():
    """Log-probabilities of a prompt's tokens are computed, not skipped, where the prompt is in the cache."""
    wanted = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=2)
    with LLM(device="cpu", context_length=256, max_sequences=2) as llm:
        first = llm.generate(PROMPTS[2], wanted)
        llm.generate(PROMPTS[2], SamplingParams(max_tokens=1))
        second = llm.generate(PROMPTS[2], wanted)
    assert first.prompt_logprobs == second.prompt_logprobs
    assert len(second.prompt_logprobs) == len(PROMPTS[2])
    assert second.stats.cached_tokens == 0
