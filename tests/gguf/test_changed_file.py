"""A model file that is cut or rewritten while it is open: an error on the next step, where it was SIGBUS."""

import os

import pytest

from engine import LLM, EngineError, SamplingParams
from tests.support.models.gguf_builder import tiny_llama

PARAMS = SamplingParams(max_tokens=4, temperature=0)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_llama())
    return path


def cut(path):
    os.truncate(path, 1000)


def rewrite(path):
    """As cp does it: the same file, other bytes."""
    data = bytearray(path.read_bytes())
    data[-4096:] = bytes(4096)
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(0, 1))  # the clock of a file system may be too coarse for a test


@pytest.mark.parametrize(("change", "words"), [(cut, "found 1000 bytes"), (rewrite, "found another time")])
@pytest.mark.parametrize("repack", [True, False])
def test_the_next_step_raises(path, change, words, repack):
    with LLM(path, device="cpu", threads=1, context_length=64, repack=repack) as llm:
        first = llm.generate([1, 2, 3], PARAMS)
        stream = llm.stream([4, 5, 6], SamplingParams(max_tokens=50, temperature=0, ignore_eos=True))
        next(iter(stream))
        change(path)
        with pytest.raises(EngineError, match=words):
            list(stream)
        for call in (lambda: llm.generate([7, 8, 9], PARAMS), lambda: llm.logits([1, 2])):
            with pytest.raises(EngineError, match="open the model again"):
                call()
        assert len(first.token_ids) == 4


def test_a_new_file_of_the_same_name_changes_nothing(path):
    with LLM(path, device="cpu", threads=1, context_length=64) as llm:
        before = llm.generate([1, 2, 3], PARAMS).token_ids
        new = path.with_suffix(".new")
        new.write_bytes(b"something else")
        new.replace(path)
        assert llm.generate([1, 2, 3], PARAMS).token_ids == before
        path.unlink()
        assert llm.generate([1, 2, 3], PARAMS).token_ids == before
