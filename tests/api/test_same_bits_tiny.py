"""The same bits for a request however it is fed, with tiny random models: nothing but this file needed.

All on the CPU; those with indexers on a GPU, too, where prompts and generated tokens have kernels of their own each.

The models have what makes rows meet: a sliding window with attention sinks and routed experts; latent attention; q, k
and v that are clamped, for which there is no kernel; indexers, which choose positions for each row; quantized rows, for
which kernels differ by the number of rows.
"""

from functools import partial

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.gguf.types import GGMLType
from tests.support.models.compressed_models import compressed
from tests.support.models.feature_models import latent, no_norm_weights, sinks_and_clamped_gates
from tests.support.models.gguf_builder import tiny_llama
from tests.support.models.indexer_models import blocks, tokens
from tests.support.models.naive_model import VOCAB
from tests.support.peers.choosers import FIRST_ALONE

CONTEXT, N = 256, 24


def sinks(path):
    """A window in every other layer, sinks in all, and experts."""
    file, _ = sinks_and_clamped_gates()
    file.meta |= {"context_length": CONTEXT, "attention.sliding_window": 20}
    return VOCAB, file.write(path)


def absorbed(path):
    """Latent attention with low-rank queries, and experts in groups."""
    file, _ = latent(True)
    file.meta["context_length"] = CONTEXT
    return VOCAB, file.write(path)


def expanded(path):
    file, _ = latent(False, low_rank_queries=False)
    file.meta["context_length"] = CONTEXT
    return VOCAB, file.write(path)


def clamped(path):
    file, _ = no_norm_weights()
    file.meta["context_length"] = CONTEXT
    return VOCAB, file.write(path)


def indexed(path):
    """Latent attention over 40 positions that an indexer chooses."""
    file, _ = tokens(**{"attention.indexer.top_k": 40})
    file.meta["context_length"] = CONTEXT
    return VOCAB, file.write(path)


def indexed_blocks(path):
    """Blocks of 16 positions, of which each key/value head has its own choice of 3."""
    file, _ = blocks()
    file.meta |= {"context_length": CONTEXT, "attention.indexer.block_size": 16}
    return VOCAB, file.write(path)


def shared_choice(path):
    """The second layer attends to the 40 positions that the first one's indexer has chosen."""
    file, _ = tokens("glm-dsa", **{"attention.indexer.top_k": 40, "attention.indexer.types": FIRST_ALONE})
    file.meta["context_length"] = CONTEXT
    return VOCAB, file.write(path)


def windows_and_blocks(path):
    """A window and compressed blocks of 4 and of 128 positions; streams that mix; experts chosen by the token."""
    return VOCAB, compressed().write(path)


def quantized(path):
    tiny_llama(path / "q.gguf", width=256, ffn=512, context_length=CONTEXT, weight_type=GGMLType.Q4_K)
    return 272, path / "q.gguf"


MODELS = [
    sinks, absorbed, expanded, clamped, indexed, indexed_blocks, shared_choice, windows_and_blocks, quantized
]  # fmt: skip
ON_GPU = [indexed, indexed_blocks, shared_choice, windows_and_blocks]


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(("cpu", make), id=make.__name__) for make in MODELS),
        *(pytest.param(("cuda", make), id=f"gpu-{make.__name__}", marks=pytest.mark.gpu) for make in ON_GPU),
    ],
)
def model(request, tmp_path_factory):
    """What opens the file, prompts for it, and what each gives on its own with nothing reused."""
    device, make = request.param
    vocab, path = make(tmp_path_factory.mktemp("tiny"))
    alike = {"threads": 2} if device == "cpu" else {"deterministic": True}
    opened = partial(LLM, path, **{"device": device} | alike)
    rng = np.random.default_rng(5)
    base = rng.integers(0, vocab, 150).tolist()
    # Of one page less one, whole pages, a common beginning that ends within a page, and one token.
    prompts = [base[:63], base[:64], base[:128], [*base[:90], *base[:20]], base, [7], base[100:117]]
    with opened(max_sequences=1, prefix_cache=False) as llm:
        alone = [outcome(llm.generate(prompt, params(i))) for i, prompt in enumerate(prompts)]
    assert len({tuple(ids) for ids, _ in alone}) == len(prompts)
    return opened, prompts, alone


def params(index, **options):
    """Greedy for every other prompt, drawn for the rest."""
    temperature = 0.0 if index % 2 else 1.0
    return SamplingParams(
        max_tokens=N, temperature=temperature, top_k=0, seed=index, ignore_eos=True, logprobs=4, **options
    )


def outcome(result):
    """Bits: floats are compared for equality."""
    return result.token_ids, result.logprobs


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"max_sequences": 7, "prefix_cache": False}, id="one batch"),
        pytest.param({"max_sequences": 3}, id="joining and leaving, prefixes reused"),
        pytest.param({"max_sequences": 2, "prefill_chunk": 5, "prefix_cache": False}, id="pieces of 5"),
        pytest.param({"max_sequences": 5, "prefill_chunk": 33}, id="pieces of 33, prefixes reused"),
        pytest.param({"max_sequences": 4, "cache_tokens": 256, "prefix_cache": False}, id="too few pages"),
        pytest.param({"max_sequences": 1, "threads": 1}, id="one after another, one thread"),
        pytest.param({"max_sequences": 7, "deterministic": True}, id="deterministic"),
    ],
)
def test_the_same_bits(model, settings):
    opened, prompts, alone = model
    with opened(**settings) as llm:
        every = [params(i) for i in range(len(prompts))]
        saved = []
        with llm.exclusive_runner() as runner:
            save = runner.save_pages
            runner.save_pages = lambda pages: saved.append(len(pages)) or save(pages)
        for order in (range(len(prompts)), reversed(range(len(prompts)))):
            order = list(order)
            results = llm.generate([prompts[i] for i in order], [every[i] for i in order])
            assert [outcome(result) for result in results] == [alone[i] for i in order]
        if settings.get("cache_tokens"):
            assert saved, "nobody was preempted: this tests nothing"
        if settings.get("prefix_cache", True) and llm.cache_tokens > CONTEXT:
            assert [result.stats.cached_tokens for result in results] == [len(prompts[i]) - 1 for i in order]


def test_more_sequences_than_a_program_of_a_decode_step_has_rows(model):
    opened, prompts, alone = model
    n = 2 * len(prompts)
    with opened(max_sequences=n) as llm:
        results = llm.generate(prompts * 2, [params(i % len(prompts)) for i in range(n)])
    assert [outcome(result) for result in results] == alone * 2


def test_samples_have_the_bits_of_their_seeds(model):
    opened, prompts, alone = model
    with opened(max_sequences=5) as llm:
        samples = llm.generate(prompts[4], params(4, n=4)).samples
        single = llm.generate(prompts[4], SamplingParams(
            max_tokens=N, temperature=1.0, top_k=0, seed=7, ignore_eos=True, logprobs=4
        ))  # fmt: skip
    assert outcome(samples[0]) == alone[4]
    assert outcome(samples[3]) == outcome(single)


def test_a_token_has_the_bits_it_has_in_a_prompt_read_at_once(model):
    """Scores of a prompt in pieces and beside others are those of the prompt alone and whole."""
    opened, prompts, _ = model
    wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=2)
    with opened(max_sequences=1, prefix_cache=False) as llm:
        whole = [llm.generate(prompt, wanted).prompt_logprobs for prompt in prompts]
    with opened(max_sequences=4, prefill_chunk=19) as llm:
        assert [result.prompt_logprobs for result in llm.generate(prompts, wanted)] == whole
