"""Recurrent states of the GPU runner behind the public calls, on a pretended card whose states are checksums of tokens.

Running ahead, slots that change, batches cut by prefill_chunk, reuse, preemption and interrupts: every text must be
that of its own tokens alone.
"""

import numpy as np
import pytest

from engine import Regex
from engine.config import PAGE
from engine.errors import DeviceError
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model
from tests.support.gpu.fake_cupy import failing
from tests.support.gpu.fake_runner import FEW_PAGES, WAYS, greedy, outcome, pretended_llm
from tests.support.gpu.helpers import generate
from tests.support.gpu.state_gpu import StateGpu, expected, fold
from tests.support.injection import interrupted
from tests.support.models.hybrid_models import tiny_hybrid
from tests.support.models.recurrent_models import LAST_BORDERS, PROMPTS, tiny_mamba

FAMILIES = ("mamba", "falcon-h1", "qwen35", "lfm2", "rwkv6", "rwkv7", "qwen4exp")
"""Convolution and scan apart; Mamba 2 beside attention; delta rules before attention; a convolution alone; states of
both parts of a layer; a table of n-grams."""

LENGTHS = (30, 70, 40, 60, 1)
"""Tokens of the texts."""


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "tiny.gguf"
    return tiny_mamba(path) if request.param == "mamba" else tiny_hybrid(path, request.param)


@pytest.fixture(scope="module")
def n_states(path):
    """Arrays of states of the model."""
    with open_gguf(path) as gguf:
        model = load_model(gguf)
        parts = [part for layer in model.config.layers for part in (layer.recurrent_part, layer.ngrams)]
        del model
    return sum(len(part.state_shapes) for part in parts if part is not None)


@pytest.fixture(scope="module")
def alone(n_states):
    """Every text on its own."""
    return [expected(prompt, n, n_states) for prompt, n in zip(PROMPTS, LENGTHS, strict=True)]


@pytest.fixture
def opened(monkeypatch, path):
    """Opens the model on the pretended card."""

    def open_model(**settings):
        return pretended_llm(monkeypatch, path, StateGpu(90, 132), **settings)

    return open_model


def params(index, **options):
    return greedy(LENGTHS[index], **options)


@pytest.mark.parametrize(
    "settings",
    [
        *WAYS,
        pytest.param({"max_sequences": 2, "checkpoints": 0}, id="no checkpoints"),
        pytest.param({"max_sequences": 3, "checkpoints": 1, "checkpoint_spacing": PAGE}, id="one checkpoint"),
    ],
)
def test_texts(opened, alone, settings):
    with opened(**settings) as llm:
        saved, save = [], llm.states.save
        llm.states.save = lambda slot, place: saved.append(slot) or save(slot, place)
        for _ in range(2):  # the second time everything is in the cache
            results = llm.generate(PROMPTS, [params(i) for i in range(len(PROMPTS))])
            assert [outcome(result) for result in results] == alone
        assert bool(saved) == (settings.get("cache_tokens") == 256)
        if settings.get("checkpoints") is None:
            reused = [result.stats.cached_tokens for result in results]
            assert reused == (LAST_BORDERS if settings.get("prefix_cache", True) else [0] * len(PROMPTS))
            assert llm.gpu.copies > 0


def test_batches_of_as_many_rows_in_other_spans_are_captured_apart(opened):
    """The same numbers of rows and results; 3 tiles of the convolution, then 4."""
    with opened() as llm, llm.exclusive_runner() as runner:
        ops, shapes = runner._machine.prompt_ops, []
        for sizes in ((8, 12), (10, 10)):
            ops.begin(Batch.build([(slot, [1] * n, 0, Outputs.LAST) for slot, n in enumerate(sizes)]))
            shapes.append(ops.shape)
        assert shapes[0] != shapes[1]


def test_sequences_that_change_slots(opened, alone, monkeypatch):
    monkeypatch.setattr("engine.scheduling.slots.PATIENCE", 0)
    with opened() as llm:
        moved, move = [], llm.states.move
        llm.states.move = lambda *given: moved.append(given) or move(*given)
        results = llm.generate(PROMPTS * 2, [params(i) for i in range(len(PROMPTS))] * 2)
        assert [outcome(result) for result in results] == alone * 2
        assert moved


FULL = "cudaErrorMemoryAllocation: out of memory"


def test_preempted_sequences_are_saved_in_pageable_memory_where_no_other_is_left(opened, alone):
    with opened(**FEW_PAGES) as llm, failing(llm.gpu, "pinned", FULL):
        results = llm.generate(PROMPTS, [params(i) for i in range(len(PROMPTS))])
        assert [outcome(result) for result in results] == alone


def test_without_host_memory_only_preempted_sequences_end(opened, alone, monkeypatch):
    def empty(*_):
        raise MemoryError("nothing is left")

    with opened(**FEW_PAGES) as llm, failing(llm.gpu, "pinned", FULL):
        streams = [llm.stream(PROMPTS[i], params(i)) for i in range(len(PROMPTS))]
        ended, texts = [], []
        with monkeypatch.context() as patch:
            patch.setattr("engine.cuda.driver.row_store.np.empty", empty)
            for stream in streams:
                try:
                    texts.append(outcome(stream.result()))
                except DeviceError as error:
                    ended.append(str(error))
        assert 1 <= len(ended) < len(streams)
        assert all("the host ran out of memory" in text for text in ended)
        assert all(text in alone for text in texts)
        assert outcome(llm.generate(PROMPTS[0], params(0))) == alone[0]


def test_samples_share_the_prompt(opened, alone):
    with opened() as llm:
        whole = llm.generate(PROMPTS[2], params(2, n=3))
    assert [outcome(sample) for sample in whole.samples] == [alone[2]] * 3
    assert [sample.stats.cached_tokens for sample in whole.samples] == [0, *[LAST_BORDERS[2]] * 2]


def committed(llm):
    """Whether every running sequence's state is where the scheduler believes it to be, all layers."""
    machine = llm.gpu.machine
    for sequence in llm._loop._scheduler.sequences():
        if sequence.n_cached == 0:
            continue
        state, tokens = 0, sequence.prompt_ids + sequence.output_ids
        for token in tokens[: sequence.n_cached]:
            state = fold(state, token)
        row = machine.states.rows.place(sequence.slot, sequence.state_place)
        arrays = [array for layer in machine.states.layers if layer is not None for array in layer.states]
        assert [llm.gpu.state(array, row) for array in arrays] == [state] * len(arrays)


def test_work_in_more_than_one_batch(opened, alone):
    """The runner cuts what is too long; the item moves the state by one place nevertheless, and can be repeated."""
    with opened(prefill_chunk=16) as llm, llm.exclusive_runner() as runner:
        for slot, chunk in enumerate((16, 17, 50, 200)):
            for _ in range(2):
                found = generate(runner, PROMPTS[0], 20, slot=slot, chunk=chunk, logprobs=0)
                assert [(one.token_id, one.logprob) for one in found] == alone[0][:20]


def cut_short(place):
    raise KeyboardInterrupt


def test_sequences_that_join_and_leave_at_any_time(opened, alone, monkeypatch):
    """Slots are taken over while steps of their last owner are under way, and rows run ahead as far as they may."""
    monkeypatch.setattr("engine.scheduling.slots.PATIENCE", 0)
    with opened(max_sequences=5) as llm:
        texts, moved, move = {}, [], llm.states.move
        llm.states.move = lambda *given: moved.append(given) or move(*given)

        def add(index, **options):
            texts[llm.add_request(PROMPTS[index], params(index, **options))] = (index, [])

        add(0)
        for turn in range(160):
            if turn % 3 == 0 and len(texts) < 24:
                add(len(texts) % 5)
            if turn % 2 and llm.active_requests:  # everything is launched, nothing is read
                with monkeypatch.context() as patch:
                    patch.setattr(llm.gpu.machine, "wait", cut_short)
                    with pytest.raises(KeyboardInterrupt):
                        llm.step()
                committed(llm)
            chunks = llm.step()
            committed(llm)
            for chunk in chunks:
                texts[chunk.request_id][1].extend(chunk.token_ids)
            if turn % 6 == 4:
                llm.cancel(list(texts)[-3])
        whole = 0
        for index, tokens in texts.values():
            assert tokens == [token for token, _ in alone[index][: len(tokens)]]
            whole += len(tokens) == LENGTHS[index]
        assert whole >= 4
        assert moved


@pytest.mark.parametrize("at", [60, 333, 701, 1234, 2020])
def test_an_interrupt_anywhere_changes_nothing(opened, alone, at):
    with opened(max_sequences=4, prefill_chunk=50) as llm:
        streams = [llm.stream(prompt, params(i)) for i, prompt in enumerate(PROMPTS)]
        results, interruptions = interrupted([stream.result for stream in streams], at, 397)
    assert interruptions > 3
    assert [outcome(result) for result in results] == alone


class Forcing:
    """A mask that allows everything, and forces a run of tokens behind every fifth one."""

    def bits(self, output_ids):
        return np.full(self.n_words, 0xFFFFFFFF, np.uint32)

    def prepare(self, wanted):
        assert any(mask is self for mask, _ in wanted)

    def forced(self, output_ids):
        return [(output_ids[-1] + i) % 200 for i in range(self.LENGTH)] if len(output_ids) % 5 == 0 else []

    def is_complete(self, output_ids):
        return False

    LENGTH, n_words = 11, 0


def forced_truth(prompt, n, n_states):
    """What a request with that mask gives: log-probability 0 for what is forced."""
    mask, found = Forcing(), []
    while len(found) < n:
        ids = [token for token, _ in found]
        found.append(expected([*prompt, *ids], 1, n_states)[0])
        found += [(token, 0.0) for token in mask.forced([*ids, found[-1][0]])]
    return found[:n]


@pytest.mark.parametrize("settings", WAYS)
def test_forced_tokens_beside_free_sequences(opened, alone, n_states, monkeypatch, settings):
    """Pieces of forced tokens while neighbours run ahead; texts and states are those of the tokens alone."""
    monkeypatch.setattr("engine.cuda.runner.SHORTEST_PIECE", Forcing.LENGTH)
    with opened(**settings) as llm:
        monkeypatch.setattr(Forcing, "n_words", -(-llm.gpu.machine.logits.shape[1] // 32))
        make = type(llm._requests)._mask
        monkeypatch.setattr(
            type(llm._requests),
            "_mask",
            lambda self, params, *rest: Forcing() if params.constraint else make(self, params, *rest),
        )
        wanted = [*alone, *(forced_truth(prompt, n, n_states) for prompt, n in zip(PROMPTS, LENGTHS, strict=True))]
        given = [params(i) for i in range(5)] + [params(i, constraint=Regex("x")) for i in range(5)]
        results = llm.generate(PROMPTS * 2, given)
        assert [outcome(result) for result in results] == wanted
        streams = [llm.stream(prompt, one) for prompt, one in zip(PROMPTS * 2, given, strict=True)]
        results, interruptions = interrupted([stream.result for stream in streams], 333, 997)
        assert interruptions > 1
        assert [outcome(result) for result in results] == wanted
        committed(llm)
