"""Rows that take turns where a step of the next size costs more than its rows are worth: which, and that texts stay."""

import pytest

from engine.config import step_sizes
from engine.cuda.launch_plan.costs import cost_of, rows_of_turns
from tests.support.gpu.cache_gpu import CacheGpu, expected
from tests.support.gpu.fake_runner import greedy, outcome, pretended_llm
from tests.support.injection import interrupted
from tests.support.models.gguf_builder import tiny_llama

LENGTHS = (30, 70, 1, 40, 60, 20, 50)
LAYERS = 2


@pytest.mark.parametrize("options", [{"mixture": False}, {"mixture": True}, {"mixture": False, "deterministic": True}])
def test_throughput_never_falls_when_rows_are_added(options):
    sizes = step_sizes(1024)
    cost = cost_of(sizes, **options)
    turns = rows_of_turns(sizes, 1024, cost)
    assert len(turns) == 1025
    assert turns[:9] == tuple(range(9)), "few rows cost what their weights cost: all of them run"
    assert turns[64:66] == (64, 64)
    speeds = [n / cost(n) for n in turns[1:]]
    assert speeds == sorted(speeds)
    assert all(taken == n or taken in sizes for n, taken in enumerate(turns) if n)


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Opens a model on the pretended card, where five to seven rows run four at a time."""
    path = tmp_path / "tiny.gguf"
    tiny_llama(path, context_length=256, n_layers=LAYERS)
    turns = (0, 1, 2, 2, 4, 4, 4, 4, 8)
    monkeypatch.setattr("engine.cuda.launch_plan.model.rows_of_turns", lambda sizes, most, cost: turns[: most + 1])
    return lambda **settings: pretended_llm(monkeypatch, path, CacheGpu(90, 132), **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"prefill_chunk": 7}, {"cache_tokens": 320, "prefix_cache": False}],
    ids=["", "pieces", "few pages"],
)
def test_texts_are_those_of_every_sequence_alone(opened, settings):
    prompts = [list(range(3 + i, 20 + 9 * i)) for i in range(len(LENGTHS))]
    wanted = [expected(prompt, n, LAYERS) for prompt, n in zip(prompts, LENGTHS, strict=True)]
    with opened(**settings) as llm:
        results = llm.generate(prompts, [greedy(n) for n in LENGTHS])
        assert [outcome(result) for result in results] == wanted
        assert max(llm.gpu.steps) == 4, "more rows than a step should take"
        streams = [llm.stream(prompt, greedy(n)) for prompt, n in zip(prompts, LENGTHS, strict=True)]
        results, interruptions = interrupted([stream.result for stream in streams], 333, 997)
        assert interruptions > 1
        assert [outcome(result) for result in results] == wanted
