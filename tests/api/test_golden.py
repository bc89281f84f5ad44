"""Text and figures that other programs gave for the same files."""

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.api.perplexity import cut, measure

STORY = (
    " there was a little boy who lived in a little house in a little house, and he had a little house in the woods. "
    "He was very fond of children, and he loved them very much, and he loved them very much.\n\nOne day, when he was "
    "out walking in the woods, he saw a little house, and he thought he would like to see it. He thought it was a "
    "little house, and he thought it was"
)
"""llama.cpp's greedy continuation of "Once upon a time" by the bundled model, 90 tokens, float32 cache."""

FIRST_CHUNKS = {"tales-f16": 22.4749, "tales-Q8_0": 22.4719, "tales-Q4_K_M": 22.4345}
"""Perplexity of the first two chunks of held_out.txt, context 512, taken from runs over the whole text (63 chunks, a
minute a file: `gguf-engine perplexity held_out.txt -m FILE --kv-type f32`) whose results, 20.9359, 20.9365 and 21.0387,
equal llama.cpp's with float32 throughout to the last digit."""


def test_greedy_story():
    with LLM(device="cpu", kv_type="f32", exact=True) as llm:
        result = llm.generate("Once upon a time", SamplingParams(max_tokens=90, temperature=0))
    assert result.text == STORY


def test_greedy_story_in_a_batch_and_in_small_chunks():
    with LLM(device="cpu", kv_type="f32", exact=True, prefill_chunk=2) as llm:
        results = llm.generate(["Once upon a time", "A", "The old man"], SamplingParams(max_tokens=90, temperature=0))
    assert results[0].text == STORY


def test_activations_of_16_bits_are_nearly_exact():
    with (
        LLM(device="cpu", kv_type="f32", activation_bits=16) as llm,
        LLM(device="cpu", kv_type="f32", exact=True) as exact,
    ):
        result = llm.generate("Once upon a time", SamplingParams(max_tokens=90, temperature=0))
        found, expected = (log_softmax(one.logits("Once upon a time" + STORY)) for one in (llm, exact))
    assert result.text == STORY
    divergence = (np.exp(expected) * (expected - found)).sum(-1)
    assert divergence.mean() < 1e-7


def log_softmax(logits):
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.shared
@pytest.mark.parametrize("name", FIRST_CHUNKS)
def test_perplexity_of_the_first_chunks(name, shared_path):
    text = shared_path("demo-model/held_out.txt").read_text(encoding="utf-8")
    with LLM(shared_path(f"demo-model/{name}.gguf"), device="cpu", kv_type="f32", exact=True) as llm:
        *_, last = measure(llm, cut(llm, text, 512)[:2])
    assert last.n_tokens == 2 * 255
    assert last.value == pytest.approx(FIRST_CHUNKS[name], rel=2e-4)
