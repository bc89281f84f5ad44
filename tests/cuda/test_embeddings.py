"""Vectors of whole texts on the GPU: close to the CPU's, whatever the batches."""

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.cpu.backend import CpuBackend
from engine.cuda.attention.cache import MOST_TEXTS
from engine.cuda.step.prompt import text_batches
from engine.cuda.step.texts import whole_texts
from engine.errors import ContextFullError, InvalidRequestError
from engine.model.config import Pooling
from engine.model.pooling import pooled
from tests.support.gpu.fake_runner import built, launched, planned, pretended
from tests.support.gpu.helpers import nmse, opened
from tests.support.models.embedding_models import MODELS
from tests.support.models.embedding_models import TEXTS as TOKENS

DECODERS = {"qwen3", "qwen3 that ranks", "llama"}
ENCODERS = [name for name in MODELS if name not in DECODERS]
TEXTS = ["Once upon a time there was a fox", "A", "The sea " * 40, "It was winter, and", "Long ago " * 100]


def test_batches_of_whole_texts():
    batches = list(text_batches([[1, 2, 3], [4], [5, 6, 7, 8, 9]], 4))
    assert [batch.token_ids.tolist() for batch in batches] == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    assert [batch.positions.tolist() for batch in batches] == [[0, 1, 2, 0], [0, 1, 2, 3], [4]]
    assert [[(span.slot, span.n_past) for span in batch.spans] for batch in batches] == [
        [(0, 0), (1, 0)],
        [(2, 0)],
        [(2, 4)],
    ]


def test_batches_of_texts_that_are_not_cut():
    lengths = [3, 5, 9, 1, 1, 1]
    texts = [[i] * n for i, n in enumerate(lengths)]
    assert [[len(ids) for ids in batch] for batch in whole_texts(texts, 9)] == [[3, 5], [9], [1, 1, 1]]
    assert list(whole_texts([], 9)) == []
    many = [[0]] * (2 * MOST_TEXTS + 1)
    assert [len(batch) for batch in whole_texts(many, 8192)] == [MOST_TEXTS, MOST_TEXTS, 1]
    wide = [[0] * 8000, *[[0]] * 400]  # a table of 125 pages for every text
    assert [len(batch) for batch in whole_texts(wide, 8192)] == [193, 208]


@pytest.mark.parametrize("arch", [90, 86])
def test_encoders_launch_what_is_planned(monkeypatch, arch, tmp_path):
    for name in ENCODERS:
        with pretended(monkeypatch, MODELS[name]().written(tmp_path), arch, context_length=64) as (runner, gpu):
            plan, texts = runner._machine.weights.plan, runner._machine.texts

            def read(texts=texts, runner=runner):
                with runner._running():
                    runner._machine.prompt_ops.use(texts._cache, None)
                    texts.launch(TOKENS, Pooling.MEAN)

            found = launched(gpu, read)
            assert found == planned(gpu, plan.texts(sum(map(len, TOKENS)))), name
            assert {source for _, source in found if source} <= built(gpu, plan), name
            shapes = [vectors.shape for vectors in runner.vectors(TOKENS, Pooling.NONE)]
            assert shapes == [(len(ids), plan.width) for ids in TOKENS]
            with pytest.raises(ContextFullError):
                runner.vectors([[1] * 65], Pooling.MEAN)
            with pytest.raises(InvalidRequestError, match="embeddings alone"):
                runner.profile(1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, tmp_path):
    """Close to numpy's vectors, the same bits in any batch, pooled on the device as on the host."""
    with opened(MODELS[name]().written(tmp_path), context_length=64) as runner:
        backend = CpuBackend(runner.model, max_sequences=1, n_pages=1, threads=1, reference=True)
        expected = backend.vectors(TOKENS)
        backend.close()
        found = runner.vectors(TOKENS, Pooling.NONE)
        for one, other, ids in zip(found, expected, TOKENS, strict=True):
            assert nmse(one, other) < 1e-5, len(ids)
            np.testing.assert_array_equal(runner.vectors([ids], Pooling.NONE)[0], one)
        for pooling in (Pooling.MEAN, Pooling.CLS, Pooling.LAST):
            for one, all_ in zip(runner.vectors(TOKENS, pooling), found, strict=True):
                np.testing.assert_allclose(one, pooled(all_, pooling), rtol=1e-6, atol=1e-7)
        del backend


@pytest.mark.gpu
def test_many_texts_of_an_encoder(tmp_path):
    """Several batches of one call, more texts than a batch may have, and the whole way through LLM.embed."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 48, n).tolist() for n in rng.integers(1, 60, 1500)]
    path = MODELS["modern-bert"]().written(tmp_path)
    with LLM(path, "cuda") as llm:
        found = llm.embed(texts)
        np.testing.assert_array_equal(llm.embed(texts[700:703]), found[700:703])
    with LLM(path, "cpu", exact=True) as llm:
        expected = llm.embed(texts[:64])
    assert np.linalg.norm(found[:64] - expected, axis=1).max() < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("prefill_chunk", [None, 64])
def test_vectors_are_close_to_the_cpus(prefill_chunk):
    with LLM(device="cpu", exact=True) as llm:
        expected = llm.embed(TEXTS, pooling="mean"), llm.embed(TEXTS, pooling="last")
    with LLM(device="cuda", prefill_chunk=prefill_chunk, max_sequences=3) as llm:
        before = llm.generate(TEXTS[0], SamplingParams(max_tokens=8, temperature=0)).text
        for pooling, vectors in zip(("mean", "last"), expected, strict=True):
            found = llm.embed(TEXTS, pooling=pooling)
            assert np.linalg.norm(found - vectors, axis=1).max() < 5e-3
        assert llm.generate(TEXTS[0], SamplingParams(max_tokens=8, temperature=0)).text == before
        with pytest.raises(ContextFullError):
            llm.embed([[1] * 2000])


@pytest.mark.gpu
def test_a_reranker(tmp_path):
    path, pairs = MODELS["qwen3 that ranks"]().written(tmp_path), [[5], [7, 30], list(range(40))]
    with LLM(path, "cpu", exact=True) as llm:
        expected = llm.embed(pairs, pooling="rank")
    with LLM(path, "cuda") as llm:
        np.testing.assert_allclose(llm.embed(pairs, pooling="rank"), expected, atol=5e-3)
