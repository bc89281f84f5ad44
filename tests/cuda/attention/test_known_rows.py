"""Forced tokens as rows of decode steps, on a pretended card whose cache holds checksums of tokens.

Every text must be that of its own tokens alone: in any batch, with too few pages, beside prompts and free sequences,
and after interrupts.
"""

from contextlib import contextmanager

import numpy as np
import pytest

from engine import Regex
from engine.cuda.launch_plan.model import KNOWN_ROWS
from tests.support.gpu.cache_gpu import CacheGpu, expected
from tests.support.gpu.fake_runner import WAYS, greedy, outcome, pretended_llm
from tests.support.injection import interrupted
from tests.support.models.gguf_builder import tiny_llama
from tests.support.models.indexer_models import tokens
from tests.support.models.naive_model import WIDTH
from tests.support.models.recurrent_models import PROMPTS
from tests.support.peers.choosers import FIRST_ALONE

LENGTHS = (30, 70, 40, 60, 1)
LAYERS = 2


class Forcing:
    """A mask that allows everything; behind every fourth token it forces as many as that token says."""

    n_words = 0

    def bits(self, output_ids):
        return np.full(self.n_words, 0xFFFFFFFF, np.uint32)

    def prepare(self, wanted):
        assert any(mask is self for mask, _ in wanted)

    def forced(self, output_ids):
        if len(output_ids) % 4:
            return []
        return [(output_ids[-1] * 3 + i) % 200 for i in range(output_ids[-1] % 5 * 5)]

    def is_complete(self, output_ids):
        return False


def plain(folder):
    """A model of plain attention."""
    tiny_llama(folder / "tiny.gguf", context_length=256, n_layers=LAYERS)
    return folder / "tiny.gguf"


def indexed(folder):
    """Every layer attends to the 40 positions that an indexer chooses, its own or the one of the layer before."""
    file, _ = tokens("glm-dsa", **{"attention.indexer.top_k": 40, "attention.indexer.types": FIRST_ALONE})
    file.meta["context_length"] = 256
    for name in ("token_embd", "output"):
        file.matrix(name, 300, WIDTH)
    return file.write(folder)


@pytest.fixture(params=[plain, indexed], ids=lambda make: make.__name__)
def make(request):
    return request.param


@pytest.fixture
def opened(monkeypatch, tmp_path, make):
    """Opens a model on the pretended card; constraints of requests are Forcing."""
    path = make(tmp_path)

    @contextmanager
    def open_model(**settings):
        with pretended_llm(monkeypatch, path, CacheGpu(90, 132), **settings) as llm, monkeypatch.context() as patch:
            patch.setattr(Forcing, "n_words", -(-llm.gpu.machine.logits.shape[1] // 32))
            make = type(llm._requests)._mask
            patch.setattr(
                type(llm._requests),
                "_mask",
                lambda self, params, *rest: Forcing() if params.constraint else make(self, params, *rest),
            )
            yield llm

    return open_model


def params(index, **options):
    return greedy(LENGTHS[index], **options)


@pytest.mark.parametrize("settings", WAYS)
def test_texts(opened, make, settings):
    free = [expected(prompt, n, LAYERS) for prompt, n in zip(PROMPTS, LENGTHS, strict=True)]
    bound = [expected(prompt, n, LAYERS, Forcing().forced) for prompt, n in zip(PROMPTS, LENGTHS, strict=True)]
    assert sum(logprob == 0 for text in bound for _, logprob in text) > 60
    given = [params(i) for i in range(5)] + [params(i, constraint=Regex("x")) for i in range(5)]
    with opened(**settings) as llm:
        results = llm.generate(PROMPTS * 2, given)
        assert [outcome(result) for result in results] == free + bound
        streams = [llm.stream(prompt, one) for prompt, one in zip(PROMPTS * 2, given, strict=True)]
        results, interruptions = interrupted([stream.result for stream in streams], 333, 997)
        assert interruptions > 1
        assert [outcome(result) for result in results] == free + bound
        assert (llm.gpu.chosen > 0) == (make is indexed)


@pytest.mark.parametrize("make", [plain], ids=["plain"])
def test_steps_are_those_of_drawn_tokens_and_runs(opened):
    """A run takes one step more, however long it is; where its rows are too many, those that there are, are full."""
    wanted = expected(PROMPTS[3], 70, LAYERS, Forcing().forced)
    with opened() as llm:
        llm.gpu.steps.clear()
        assert outcome(llm.generate(PROMPTS[3], params(1, constraint=Regex("x")))) == wanted
        steps = [n for n in llm.gpu.steps[::LAYERS] if n]
        drawn = sum(logprob < 0 for _, logprob in wanted)
        assert max(steps) > 1
        assert len(steps) <= drawn + sum(n > 1 for n in steps) + 3
        llm.gpu.steps.clear()
        results = llm.generate([PROMPTS[3]] * 8, [params(1, constraint=Regex("x"))] * 8)
        assert [outcome(result) for result in results] == [wanted] * 8
        assert KNOWN_ROWS <= max(llm.gpu.steps) <= KNOWN_ROWS + 8
