"""gguf-engine embed."""

import json

import numpy as np
import pytest

from engine import LLM
from tests.support.command_line import run
from tests.support.models.embedding_models import WORDPIECE, bert_like, ranks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = bert_like("bert", positions=True), ranks(bert_like("bert", positions=True))
    return [file.written(folder, WORDPIECE) for file in made]


def test_texts_lines_and_files(files, tmp_path):
    (tmp_path / "text.txt").write_text("c a")
    done = run("embed", "-m", files[0], "--device", "cpu", "a b", "-", "-f", tmp_path / "text.txt", stdin="b\na\n")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    with LLM(files[0], "cpu") as llm:
        expected = llm.embed(["a b", "b", "a", "c a"])
    assert [(one["index"], one["tokens"]) for one in found] == [(0, 4), (1, 3), (2, 3), (3, 4)]
    np.testing.assert_allclose([one["embedding"] for one in found], expected, atol=1e-6)
    assert "4 texts, 14 tokens" in done.stderr
    plain = run("embed", "-m", files[0], "--device", "cpu", "a b", "--plain", "--dimensions", "5", "--no-normalize")
    assert len(plain.stdout.split()) == 5


def test_ranking(files):
    done = run("embed", "-m", files[1], "--device", "cpu", "-q", "a", "b", "c", "a b")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    with LLM(files[1], "cpu") as llm:
        expected = llm.rerank("a", ["b", "c", "a b"])
    assert [(one["index"], one["document"]) for one in found] == [(one.index, one.document) for one in expected]


def test_no_text(files):
    assert "no text is given" in run("embed", "-m", files[0], status=2).stderr
