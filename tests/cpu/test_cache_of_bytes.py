"""A cache of 8 bits on the CPU: a text's tokens whatever becomes of its pages and of the requests beside it."""

import random
import signal

import pytest

from engine import LLM, SamplingParams
from tests.support.injection import without_collector_callbacks

GREEDY = SamplingParams(max_tokens=90, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
BEGIN = [random.Random(5).randrange(300, 4000) for _ in range(150)]
PROMPTS = [[*BEGIN[: 20 + 37 * number], 7 + number] for number in range(4)]
"""Beginnings of one another, of which all but the first end inside of a page that the next one goes on in."""


def opened(**settings):
    return LLM(device="cpu", threads=2, kv_type="q8_0", context_length=256, **settings)


@pytest.fixture(scope="module")
def alone():
    """The tokens of each prompt with nothing beside it, before it or in the cache."""
    with opened(max_sequences=1, prefix_cache=False) as llm:
        return [llm.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]


def test_preempted_sequences_go_on_as_if_nothing_had_been(alone):
    with opened(max_sequences=4, cache_tokens=384, prefix_cache=False) as llm:
        assert [result.token_ids for result in llm.generate(PROMPTS, GREEDY)] == alone
        assert llm.occupancy().preemptions > 0


@pytest.mark.parametrize("order", [1, -1])
def test_prompts_reuse_whole_pages_and_parts_of_pages(alone, order):
    with opened(max_sequences=2) as llm:
        reused = []
        for prompt, tokens in list(zip(PROMPTS, alone, strict=True))[::order]:
            result = llm.generate(prompt, GREEDY)
            assert result.token_ids == tokens
            reused.append(result.stats.cached_tokens)
        assert reused[1:] == [len(prompt) - 1 for prompt in (PROMPTS[:-1] if order > 0 else PROMPTS[-2::-1])]


def test_samples_share_the_pages_of_their_prompt(alone):
    with opened(max_sequences=3) as llm:
        found = llm.generate(PROMPTS[3], SamplingParams(n=3, max_tokens=90, temperature=0, ignore_eos=True))
        assert [sample.token_ids for sample in found.samples] == [alone[3]] * 3


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")
def test_interrupted_requests_leave_no_wrong_page(alone):
    """Real signals in prompts and decode steps, of requests whose pages the next ones take over or share."""
    dice = random.Random(1)

    def interrupt(number, frame):
        signal.raise_signal(signal.SIGINT)

    with without_collector_callbacks(), opened(max_sequences=2, cache_tokens=512) as llm:
        llm.generate(PROMPTS, SHORT)
        before = signal.signal(signal.SIGALRM, interrupt), signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupted = 0
        try:
            for turn in range(120):
                number = turn % len(PROMPTS)
                other = [*BEGIN[: dice.randrange(1, 150)], turn]
                try:
                    signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.0001, 0.02))
                    llm.generate([PROMPTS[number], other], GREEDY)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
                assert llm.generate(PROMPTS[number], SHORT).token_ids == alone[number][:20], turn
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before[0])
            signal.signal(signal.SIGINT, before[1])
        assert interrupted > 20
        assert [result.token_ids for result in llm.generate(PROMPTS, GREEDY)] == alone
