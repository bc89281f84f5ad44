"""LLM.embed and LLM.rerank: prompts, settings, batches and errors; values are those of test_peer_embeddings.py."""

import asyncio
import threading

import numpy as np
import pytest

from engine import LLM, AsyncLLM, ContextFullError, EngineError, InvalidRequestError, SamplingParams
from engine.gguf.quants import dequantize
from tests.support.models.embedding_models import CONTEXT, WIDTH, WORDPIECE, bert_like, qwen3, qwen3_reranker, ranks
from tests.support.models.hybrid_models import tiny_hybrid

CLS, SEP, A, B = 2, 3, 5, 6


def opened(file, folder, tokenizer=WORDPIECE, **settings):
    return LLM(file.written(folder, tokenizer), "cpu", threads=2, **settings)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    with opened(bert_like("bert", positions=True), tmp_path_factory.mktemp("bert")) as llm:
        yield llm


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    with opened(ranks(bert_like("bert", positions=True)), tmp_path_factory.mktemp("rank")) as llm:
        yield llm


def test_one_row_for_each_text(bert):
    several = bert.embed(["a b", [CLS, A, SEP], "b"])
    assert (several.shape, several.dtype, bert.embeddings.width) == ((3, WIDTH), np.float32, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(several, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(bert.embed("a"), several[1:2])
    np.testing.assert_array_equal(bert.embed([CLS, A, SEP]), several[1:2])
    assert bert.embed([]).shape == (0, WIDTH)


def test_poolings_are_made_of_the_tokens_vectors(bert):
    (tokens,) = bert.embed(["abc b"], pooling="none", normalize=False)
    assert tokens.shape == (6, WIDTH)
    for pooling, expected in (("mean", tokens.mean(0)), ("cls", tokens[0]), ("last", tokens[-1])):
        raw = bert.embed(["abc b"], pooling=pooling, normalize=False)[0]
        np.testing.assert_allclose(raw, expected, rtol=1e-5, atol=1e-6)
        unit = bert.embed(["abc b"], pooling=pooling, dimensions=10)[0]
        np.testing.assert_allclose(unit, expected[:10] / np.linalg.norm(expected[:10]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(bert.embed("abc b"), bert.embed("abc b", pooling="mean"))  # as the file says


def test_instructions(bert):
    plain = bert.embed("ab. c")
    np.testing.assert_array_equal(bert.embed("c", instruction="ab. "), plain)
    np.testing.assert_array_equal(bert.embed("ab.", instruction="{text} c"), plain)


def test_texts_that_are_too_long(bert):
    text = "a " * 300
    with pytest.raises(ContextFullError, match=r"302 tokens .of one text. do not fit the context of 128"):
        bert.embed(["b", text])
    cut = [CLS, *[A] * (CONTEXT - 2), SEP]
    np.testing.assert_array_equal(bert.embed([text], truncate=True), bert.embed([cut]))


def test_a_text_does_not_depend_on_its_batch(bert, monkeypatch):
    texts = ["a " * n + "b" for n in (1, 63, 40, 2, 64, 17, 100)]
    together = bert.embed(texts)
    monkeypatch.setattr(bert._runner, "text_tokens", 1)
    np.testing.assert_array_equal(bert.embed(texts), together)


@pytest.mark.parametrize(
    ("given", "settings", "complaint"),
    [
        (["a"], {"pooling": "max"}, "pooling is 'max'; allowed are none, mean, cls, last, rank"),
        (["a"], {"pooling": "rank"}, "no classification head"),
        (["a"], {"dimensions": 0}, "dimensions is 0; allowed are 1 to 64"),
        (["a"], {"dimensions": 65}, "dimensions is 65"),
        ([[1, 48]], {}, "token id 48 is outside the vocabulary"),
        ([[1]], {"instruction": "a"}, "token ids have theirs"),
        ([3.5], {}, "a prompt is text or a list"),
        (None, {}, "a prompt is text or a list"),
    ],
)
def test_what_is_refused(bert, given, settings, complaint):
    with pytest.raises(InvalidRequestError, match=complaint):
        bert.embed(given, **settings)


def test_an_encoder_generates_nothing(bert):
    for call in (bert.generate, bert.stream, bert.logits, bert.add_request):
        with pytest.raises(InvalidRequestError, match=r"makes embeddings and no text: use LLM\.embed"):
            call("a")
    with pytest.raises(InvalidRequestError, match="makes embeddings and no text"):
        next(bert.score([[1, 2]]))


def test_documents_in_the_order_of_their_scores(reranker):
    documents = ["a", "b c", "c", "a a a a a a a"]
    found = reranker.rerank("a b", documents)
    pairs = [[CLS, A, B, SEP, *reranker.tokenizer.encode(text, add_special=False)] for text in documents]
    scores = reranker.embed(pairs, pooling="rank")[:, 0]
    assert [one.index for one in found] == np.argsort(-scores).tolist()
    assert [one.score for one in found] == sorted(scores.tolist(), reverse=True)
    assert [one.document for one in found] == [documents[one.index] for one in found]
    assert reranker.rerank("a b", documents, top_n=2) == found[:2]
    assert reranker.rerank("a b", []) == []
    for query, given in ((1, ["a"]), ("a", "a"), ("a", [1])):
        with pytest.raises(InvalidRequestError):
            reranker.rerank(query, given)
    with pytest.raises(InvalidRequestError, match="this model ranks: use rerank, or name a pooling"):
        reranker.embed("a")


def test_the_template_of_a_reranker(tmp_path):
    template = "q {query} d {document}."
    with opened(qwen3_reranker(), tmp_path, WORDPIECE | {"tokenizer.chat_template.rerank": template}) as llm:
        (one,) = llm.rerank("{document}", ["a"])  # what a query says is no template
        ids = llm.tokenizer.encode("q {document} d a.", add_special=False)
        assert one.score == pytest.approx(llm.embed([ids], pooling="rank")[0, 0])
        assert 0 < one.score < 1


def test_embeddings_beside_generation(tmp_path):
    with opened(qwen3(), tmp_path) as llm:
        expected = llm.embed(["a b", "b"])
        text = llm.generate("a", SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)).text
        stream = llm.stream("a", SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
        next(stream)
        np.testing.assert_array_equal(llm.embed(["a b", "b"]), expected)
        assert stream.result().text == text


def test_long_texts_of_causal_models_are_read_in_pieces(tmp_path, monkeypatch):
    text = [(7 * i) % 48 for i in range(100)]
    with opened(qwen3(), tmp_path) as llm:
        whole = llm.embed([text, text[:5]], pooling="none", normalize=False)
        monkeypatch.setattr("engine.cpu.text_pass.PIECE", 33)
        pieces = llm.embed([text, text[:5]], pooling="none", normalize=False)
    for found, expected in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["lfm2", "falcon-h1"])
def test_recurrent_layers_begin_anew_with_every_text(family, tmp_path, monkeypatch):
    tiny_hybrid(tmp_path / "model.gguf", family)
    texts = [[(3 * i + n) % 250 for i in range(n)] for n in (3, 50, 1)]
    with LLM(tmp_path / "model.gguf", "cpu", threads=2, exact=True, kv_type="f32") as llm:
        together = llm.embed(texts, pooling="none", normalize=False)
        expected = [llm.logits(text) for text in texts]
        head = llm.model.weights.head.weight
        for vectors, logits in zip(together, expected, strict=True):
            np.testing.assert_allclose(vectors @ dequantize(head.raw, head.type).T, logits, rtol=1e-3, atol=1e-3)
        monkeypatch.setattr("engine.cpu.text_pass.PIECE", 7)
        for pieces, whole in zip(llm.embed(texts, pooling="none", normalize=False), together, strict=True):
            np.testing.assert_allclose(pieces, whole, rtol=1e-3, atol=1e-4)


def test_callers_share_batches(bert):
    texts = [["a " * n for n in range(1, 30)], ["b " * n for n in range(1, 20)], ["c"]]
    expected = [bert.embed(one) for one in texts]
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: bert.embed(texts[i])})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, one in enumerate(expected):
        np.testing.assert_array_equal(found[i], one)


def test_an_interrupt_loses_only_the_callers_texts(bert, monkeypatch):
    queue = bert.embeddings._queue
    vectors = bert._runner.vectors
    monkeypatch.setattr(bert._runner, "vectors", lambda texts, pooling: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        bert.embed("a")
    monkeypatch.setattr(bert._runner, "vectors", vectors)
    assert not queue._groups
    assert bert.embed("a").shape == (1, WIDTH)


def test_a_failed_batch_fails_its_callers(bert, monkeypatch):
    def fail(texts, pooling):
        raise EngineError("no memory")

    monkeypatch.setattr(bert._runner, "vectors", fail)
    with pytest.raises(EngineError, match="no memory"):
        bert.embed("a")


def test_asynchronous_calls(bert, reranker):
    async def main():
        embedding, ranking = AsyncLLM(bert), AsyncLLM(reranker)
        vectors, ranked = await asyncio.gather(embedding.embed(["a", "b"]), ranking.rerank("a", ["b", "c"], top_n=1))
        for documents, settings in (("bc", {}), (["b"], {"top_n": 0}), (["b"], {"top_n": 1.5})):
            with pytest.raises(InvalidRequestError):
                await ranking.rerank("a", documents, **settings)
        for one in (embedding, ranking):
            await asyncio.to_thread(one._driver.close)
        return vectors, ranked

    vectors, ranked = asyncio.run(main())
    np.testing.assert_array_equal(vectors, bert.embed(["a", "b"]))
    assert ranked == reranker.rerank("a", ["b", "c"], top_n=1)


def test_a_closed_model(tmp_path):
    llm = opened(bert_like("bert", positions=True), tmp_path)
    llm.close()
    with pytest.raises(EngineError, match="the model is closed"):
        llm.embed("a")
