"""A cache of 8 bits on a GPU: logits of whole models, the same bits in any batch, and pages that are moved."""

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.api.llm import BUNDLED_MODEL
from engine.cpu.caches.attention import AttentionCache
from engine.model.kv_format import dequantize, quantize
from tests.support.gpu.helpers import cpu_logits, decode_logits, nmse, opened

pytestmark = pytest.mark.gpu

BOUND = 1e-5
"""Of logits: kernels of prompts round queries, weights and dequantized numbers to float16, and a key or value that is
another one's neighbour in float32 may round to the next number of 8 bits."""

IDS = np.random.default_rng(5).integers(0, 4000, 400)


@pytest.fixture
def rounding_reference(monkeypatch):
    """The CPU reference with a float32 cache whose rows are rounded as the format says."""
    store = AttentionCache.append

    def rounded(cache, pages, positions, k, v):
        store(cache, pages, positions, *(dequantize(*quantize(np.ascontiguousarray(x, np.float32))) for x in (k, v)))

    monkeypatch.setattr(AttentionCache, "append", rounded)


def test_logits_are_those_of_a_rounded_cache(rounding_reference):
    with opened(BUNDLED_MODEL, kv_type="q8_0", max_sequences=2) as runner:
        expected = cpu_logits(runner.model, IDS)
        assert nmse(runner.logits(IDS), expected) < BOUND
        assert nmse(decode_logits(runner, IDS[:150]), expected[:150]) < BOUND


def test_rows_are_the_same_in_pieces_and_in_steps_of_any_size():
    whole, stepped = {}, {}
    for chunk, slots in ((None, 1), (100, 3), (64, 40), (None, 200)):
        with opened(
            BUNDLED_MODEL, kv_type="q8_0", prefill_chunk=chunk, max_sequences=slots, deterministic=True
        ) as runner:
            whole[chunk, slots] = runner.logits(IDS).tobytes()
            if slots < 64:
                stepped[slots] = decode_logits(runner, IDS[:140], slot=slots - 1).tobytes()
    assert len(set(whole.values())) == 1
    assert len(set(stepped.values())) == 1


def test_texts_are_the_same_when_they_are_preempted_and_when_they_share_pages():
    prompts = [f"{start} a time" for start in ("Once upon", "There was", "Long ago, many")] * 3
    params = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)
    texts = []
    for tokens in (1024, 4096):
        with LLM(
            BUNDLED_MODEL, device="cuda", kv_type="q8_0", max_sequences=9, cache_tokens=tokens, context_length=256
        ) as llm:
            texts.append([result.token_ids for result in llm.generate(prompts, params)])
    assert texts[0] == texts[1]
