"""Vectors of whole texts on the GPU: close to the CPU's, whatever the batches; and what the GPU declines."""

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.cuda.load.features import missing_features
from engine.cuda.step.prompt import text_batches
from engine.errors import ContextFullError
from engine.gguf.reader import open_gguf
from engine.model.loader import load_model
from tests.support.models.embedding_models import MODELS

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


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("bert", ["models that make embeddings alone", "types of tokens", "norms behind residuals"]),
        ("t5encoder", ["models that make embeddings alone", "attention to later tokens", "biases of distances"]),
        ("llama, both directions", ["models that make embeddings alone", "attention to later tokens"]),
        ("qwen3 that ranks", []),
    ],
)
def test_encoders_are_declined_by_name(name, missing, tmp_path):
    with open_gguf(MODELS[name]().written(tmp_path)) as gguf:
        found = missing_features(load_model(gguf))
    assert set(missing) <= set(found)
    assert bool(missing) == bool(found)


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
