"""Rankings and embeddings of files made for them, in the words of llama.cpp, Jina, Cohere, Hugging Face and Ollama."""

import numpy as np
import pytest

from engine.serve.models.model_store import ModelSpec
from tests.support.models.embedding_models import WORDPIECE, bert_like, ranks
from tests.support.servers.http_server import running

DOCUMENTS = ["a", "b c", "c", "a a a"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    embeds = bert_like("bert", positions=True).written(folder, WORDPIECE)
    scores = ranks(bert_like("bert", positions=True)).written(folder, WORDPIECE)
    with running([ModelSpec("embeds", str(embeds)), ModelSpec("ranks", str(scores))]) as one:
        one.get("/props")  # opens the first
        one.post("/v1/rerank", {"model": "ranks", "query": "a", "documents": ["b"]})
        yield one


@pytest.fixture(scope="module")
def vectors(server):
    return server.llm.embed(DOCUMENTS)


@pytest.fixture(scope="module")
def ranking(server):
    return server.serving.store.models[1].llm.llm.rerank("a b", DOCUMENTS)


def test_llama_cpps_embeddings(server, vectors):
    status, _, found = server.post("/embedding", {"content": DOCUMENTS})
    assert (status, [one["index"] for one in found]) == (200, [0, 1, 2, 3])
    np.testing.assert_allclose([one["embedding"][0] for one in found], vectors, atol=1e-6)
    tokens = server.post("/embeddings", {"input": "a b", "pooling": "none", "embd_normalize": -1})[2]
    assert np.shape(tokens[0]["embedding"]) == (4, 64)


def test_ollamas_embeddings(server, vectors):
    _, _, found = server.post("/api/embed", {"model": "embeds", "input": DOCUMENTS})
    np.testing.assert_allclose(found["embeddings"], vectors, atol=1e-6)
    assert found["prompt_eval_count"] == sum(len(server.llm.prompt_ids(text)) for text in DOCUMENTS)
    assert server.post("/api/embed", {"input": "a " * 300})[0] == 200
    status, _, error = server.post("/api/embed", {"input": "a " * 300, "truncate": False})
    assert (status, "do not fit the context" in error["error"]) == (400, True)
    _, _, old = server.post("/api/embeddings", {"model": "embeds", "prompt": "a"})
    raw = np.array(old["embedding"])
    np.testing.assert_allclose(raw / np.linalg.norm(raw), vectors[0], atol=1e-6)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/v1/reranking"])
def test_rankings(server, ranking, path):
    body = {"model": "ranks", "query": "a b", "documents": DOCUMENTS, "top_n": 3}
    status, _, found = server.post(path, body)
    expected = [{"index": one.index, "relevance_score": pytest.approx(one.score)} for one in ranking[:3]]
    assert (status, found["results"]) == (200, expected)
    assert found["usage"]["total_tokens"] == sum(len(server.llm.prompt_ids(text)) + 2 for text in DOCUMENTS)


def test_rankings_with_documents(server, ranking):
    objects = [{"text": text} for text in DOCUMENTS]
    body = {"model": "ranks", "query": "a b", "documents": objects, "return_documents": True}
    found = server.post("/v1/rerank", body)[2]["results"]
    assert [one["document"]["text"] for one in found] == [one.document for one in ranking]
    texts = server.post("/rerank", {"model": "ranks", "query": "a b", "texts": DOCUMENTS, "return_text": True})[2]
    assert [(one["index"], one["text"]) for one in texts] == [(one.index, one.document) for one in ranking]
    assert [one["score"] for one in texts] == pytest.approx([one.score for one in ranking])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "a"}, "documents"),
        ({"query": "a", "documents": [1]}, "documents[0]"),
        ({"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
    ],
)
def test_rankings_that_are_refused(server, fields, param):
    status, _, error = server.post("/v1/rerank", {"model": "ranks", **fields})
    assert (status, error["error"]["param"]) == (400, param)


def test_a_model_for_something_else(server):
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/v1/embeddings", {"model": "ranks", "input": "a"}),
    ):
        status, _, error = server.post(path, body)
        assert (status, error["error"]["type"]) == (400, "invalid_request_error"), path
