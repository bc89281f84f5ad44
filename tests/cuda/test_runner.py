"""The GPU runner's behaviour: replay, neighbours, memory, slots that come and go, and its errors."""

import gc
import re
from functools import partial

import numpy as np
import pytest

from engine import LLM, Choice, JsonSchema, Regex, SamplingParams
from engine.api.llm import BUNDLED_MODEL
from engine.cuda.attention.attention_plan import PAGE
from engine.cuda.launch_plan.ahead import MOST_AHEAD
from engine.errors import ContextFullError, DeviceError, EngineError, InvalidRequestError
from engine.gguf.types import GGMLType
from engine.request import ActiveSequence, Work
from tests.support.gpu.helpers import (
    cpu_logits,
    decode_logits,
    generate,
    nmse,
    opened,
    own_bytes,
    pages_of,
    token_ids,
    typed_model,
)
from tests.support.models.hybrid_models import tiny_hybrid

pytestmark = pytest.mark.gpu

PROMPTS = [
    "Once upon a time",
    "A",
    "The old man and the fox went into the woods, and",
    "There was a king who had three daughters. The youngest of them",
    "In the middle of the night",
    "Long ago, when animals could speak, a",
    "The sea",
    "It was winter, and the snow lay deep on the fields around the little house where",
]


alike = partial(opened, deterministic=True)
"""A runner in which a row's bits do not depend on how many others there are."""


@pytest.fixture(scope="module")
def prompts():
    with LLM(device="cpu", exact=True) as llm:
        return [llm.tokenizer.encode(text, add_special=True) for text in PROMPTS]


def bits(array):
    return array.view(np.uint32)


def fingerprint(samples):
    """Tokens and the exact log-probabilities behind them."""
    return [(sample.token_id, sample.logprob, sample.top_logprobs) for sample in samples]


# ---- the same bits --------------------------------------------------------------------------------------------------


def test_replay_equals_eager_launches(prompts):
    found = []
    for eager in (True, False):
        with opened(BUNDLED_MODEL, eager=eager, max_sequences=2) as runner:
            for slot in (0, 1):
                samples = generate(runner, prompts[0], 40, slot=slot, logprobs=8, release=False)
                with runner._running():
                    runner._gpu.stream.synchronize()
                    found.append((fingerprint(samples), bits(runner._machine.logits[slot].get()).tolist()))
                runner.release(slot)
    assert found[0] == found[2]
    assert found[1] == found[3]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 7}], ids=["greedy", "seeded"])
def test_run_to_run(prompts, options):
    runs = []
    for _ in range(2):
        with opened(BUNDLED_MODEL) as runner:
            runs += [fingerprint(generate(runner, prompts[2], 60, logprobs=8, **options)) for _ in range(2)]
    assert runs[0] == runs[1] == runs[2] == runs[3]


def test_a_row_does_not_depend_on_its_place_or_neighbours(prompts):
    """Bit for bit, in every bucket: the order of a row's sums is its own."""
    ids = prompts[3] * 6
    with alike(BUNDLED_MODEL, max_sequences=8) as runner:
        alone = decode_logits(runner, ids)
        for slot in (1, 2, 5, 7):
            np.testing.assert_array_equal(bits(decode_logits(runner, ids, slot=slot)), bits(alone))


def step_together(runner, sequences, n):
    """n decode steps of sequences whose prompts have been read."""
    for _ in range(n):
        work = [Work(one, one.output_ids[-1:], one.n_cached, True, decode=True) for one in sequences]
        for one, sample in zip(sequences, runner.step(work), strict=True):
            one.n_cached += 1
            one.output_ids.append(sample.token_id)


def new_sequence(runner, prompt, slot, request_id, pages=None, **options):
    params = SamplingParams(**({"temperature": 0} | options))
    pages = pages_of(runner, slot) if pages is None else pages
    return ActiveSequence(request_id, slot, list(prompt), [], params, 11, pages=pages)


def start(runner, prompt, slot, request_id, pages=None, **options):
    sequence = new_sequence(runner, prompt, slot, request_id, pages, **options)
    (sample,) = runner.step([Work(sequence, sequence.prompt_ids, 0, True)])
    sequence.n_cached = len(prompt)
    sequence.output_ids.append(sample.token_id)
    return sequence


def test_a_batch_gives_everyone_the_text_it_gets_alone(prompts):
    with alike(BUNDLED_MODEL, max_sequences=8) as runner:
        alone = [token_ids(generate(runner, prompt, 40)) for prompt in prompts]
        together = [start(runner, prompt, slot, 1000 + slot) for slot, prompt in enumerate(prompts)]
        step_together(runner, together, 39)
        assert [one.output_ids for one in together] == alone


def test_joining_and_leaving(prompts):
    """Sequences come and go at odd moments; slots are taken over while results of their last owner are under way."""
    with alike(BUNDLED_MODEL, max_sequences=4) as runner:
        alone = [token_ids(generate(runner, prompt, 60)) for prompt in prompts]
        a = start(runner, prompts[0], 0, 2000)
        step_together(runner, [a], 7)
        b = start(runner, prompts[1], 1, 2001)
        c = start(runner, prompts[2], 3, 2002)
        step_together(runner, [a, b, c], 5)
        runner.release(1)
        step_together(runner, [a, c], 1)
        d = start(runner, prompts[3], 1, 2003)
        step_together(runner, [c, d, a], 9)
        runner.release(0)
        runner.release(3)
        e = start(runner, prompts[4], 0, 2004)
        step_together(runner, [d, e], 20)
        for one, text in ((a, alone[0]), (b, alone[1]), (c, alone[2]), (d, alone[3]), (e, alone[4])):
            assert one.output_ids == text[: len(one.output_ids)], one.request_id


def test_many_prompts_between_two_reads_of_a_running_sequence(prompts):
    """Results that wait on the device survive the first tokens of sequences that join in the same step."""
    with alike(BUNDLED_MODEL, max_sequences=24) as runner:
        alone = [token_ids(generate(runner, prompt, 12)) for prompt in prompts]
        first = start(runner, prompts[0], 0, 3000)
        step_together(runner, [first], 4)
        joining = [new_sequence(runner, prompts[i % 8], 1 + i, 3001 + i) for i in range(23)]
        work = [Work(first, first.output_ids[-1:], first.n_cached, True, decode=True)]
        work += [Work(one, one.prompt_ids, 0, True) for one in joining]
        everyone = [first, *joining]
        for one, item, sample in zip(everyone, work, runner.step(work), strict=True):
            one.n_cached += len(item.token_ids)
            one.output_ids.append(sample.token_id)
        step_together(runner, everyone, 6)
        assert first.output_ids == alone[0][: len(first.output_ids)]
        for i, one in enumerate(joining):
            assert one.output_ids == alone[i % 8][:7], i


def test_prompt_pieces_of_any_size_give_the_same_text(prompts):
    prompt = (prompts[7] * 12)[:150]
    with opened(BUNDLED_MODEL, kv_type="f32") as runner:
        expected = cpu_logits(runner.model, prompt)[-1].argmax()
        for chunk in (1, 3, 16, 17, 64, 512):
            assert generate(runner, prompt, 1, chunk=chunk)[0].token_id == expected, chunk


def test_an_interrupted_sequence_goes_on_from_any_place(prompts):
    """Feeding other tokens than the device is ahead with, or earlier positions, overwrites what it had."""
    with opened(BUNDLED_MODEL, max_sequences=2) as runner:
        text = token_ids(generate(runner, prompts[0], 20))
        one = start(runner, prompts[0], 0, 4000)
        step_together(runner, [one], 9)
        cut = one.n_cached - 5
        ids = (one.prompt_ids + one.output_ids)[cut : one.n_cached + 1]
        (sample,) = runner.step([Work(one, ids, cut, True)])
        assert sample.token_id == text[10]
        (sample,) = runner.step([Work(one, [text[0]], len(one.prompt_ids), True, decode=True)])
        assert sample.token_id == text[1]


def test_a_prompt_has_the_same_bits_alone_in_a_batch_and_in_pieces(prompts):
    """Log-probabilities of the first token: by the prompt alone, whatever runs beside it and however it is cut."""
    longer = [(prompts[i % 8] * 40)[: 30 * i + 1] for i in range(8)]
    with alike(BUNDLED_MODEL, max_sequences=8) as runner:
        alone = [fingerprint(generate(runner, prompt, 1, logprobs=8)) for prompt in longer]
        together = [new_sequence(runner, prompt, slot, 2400 + slot, logprobs=8) for slot, prompt in enumerate(longer)]
        samples = runner.step([Work(one, one.prompt_ids, 0, True) for one in together])
        assert [fingerprint([sample]) for sample in samples] == alone
        for chunk in (1, 50, 64):
            assert fingerprint(generate(runner, longer[5], 1, logprobs=8, chunk=chunk)) == alone[5], chunk


@pytest.mark.parametrize("family", [None, "qwen35", "mamba2", "kimi-linear"])
def test_replayed_prompts_equal_those_launched_one_by_one(prompts, family, tmp_path):
    """Other tokens, other slots, other neighbours: a graph has the shape alone. Recurrent states are data as well."""
    found = []
    path = BUNDLED_MODEL if family is None else tiny_hybrid(tmp_path / "model.gguf", family)
    for eager in (True, False):
        with opened(path, max_sequences=4, eager=eager) as runner:
            vocab = runner.config.vocab_size
            texts = [[token % vocab for token in prompts[i % 8] * 9][:70] for i in range(6)]
            samples = [fingerprint(generate(runner, text, 2, slot=i % 4, logprobs=4)) for i, text in enumerate(texts)]
            for turn in range(5):
                pair = [
                    new_sequence(runner, texts[turn + i], 2 * i + 1, 9000 + turn * 2 + i, logprobs=4) for i in (0, 1)
                ]
                samples.append(fingerprint(runner.step([Work(one, one.prompt_ids, 0, True) for one in pair])))
                for one in pair:
                    runner.release(one.slot)
            found.append(samples)
    assert found[0] == found[1]


def test_scattered_pages_give_the_same_bits(prompts):
    """Pages in any order, also where prompt and text cross many of them."""
    prompt = (prompts[7] * 20)[:300]
    with opened(BUNDLED_MODEL, max_sequences=4) as runner:
        order = np.random.default_rng(5).permutation(runner.n_pages)
        alike = [fingerprint(generate(runner, prompt, 100, slot=2, logprobs=4, order=o)) for o in (None, order)]
        assert alike[0] == alike[1]


def test_a_row_waits_for_pages_without_stopping_the_others(prompts):
    """Pages come one at a time, at the last moment or before; who has none for the steps ahead just is not ahead."""
    with alike(BUNDLED_MODEL, max_sequences=3) as runner:
        alone = [token_ids(generate(runner, prompt, 150)) for prompt in prompts[:3]]
        pages = [pages_of(runner, slot) for slot in range(3)]
        rows = [start(runner, prompts[slot], slot, 2500 + slot, pages[slot][:1]) for slot in range(3)]
        for _ in range(149):
            for slot, one in enumerate(rows):
                ahead = (0, 1, 40)[slot]  # the first gets a page when it must have it, the last long before
                one.pages = pages[slot][: (one.n_cached + ahead) // PAGE + 1]
            step_together(runner, rows, 1)
        assert [one.output_ids for one in rows] == alone


def test_pages_of_a_cancelled_sequence_serve_another_at_once(prompts):
    """Steps of the old owner are under way when its pages are given away; nothing they write is ever read."""
    with alike(BUNDLED_MODEL, max_sequences=4) as runner:
        alone = [fingerprint(generate(runner, prompt, 30, logprobs=2)) for prompt in prompts]
        pages = pages_of(runner, 0)
        other = start(runner, prompts[0], 1, 2600, logprobs=2)
        for turn in range(12):
            one = start(runner, prompts[turn % 8], 0, 2601 + turn, pages)
            step_together(runner, [one, other], 1 + turn % 3)
            runner.release(0)
            slot = (0, 2, 3)[turn % 3]  # same pages, the same slot or another one
            found = generate(runner, prompts[(turn + 1) % 8], 30, slot=slot, logprobs=2, order=swapped(runner, slot))
            assert fingerprint(found) == alone[(turn + 1) % 8], turn


def swapped(runner, slot):
    """A permutation that gives a slot the pages of slot 0."""
    order = np.arange(runner.n_pages)
    each = len(pages_of(runner, 0))
    order[slot * each : (slot + 1) * each], order[:each] = (
        np.arange(each),
        order[slot * each : (slot + 1) * each].copy(),
    )
    return order


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "repetition_penalty": 1.2}], ids=["greedy", "sampled"])
def test_a_swapped_out_sequence_goes_on_with_the_same_text(prompts, options):
    with alike(BUNDLED_MODEL, max_sequences=4) as runner:
        whole = [start(runner, prompts[i], i, 2700 + i, logprobs=2, **options) for i in range(2)]
        step_together(runner, whole, 80)
        for slot in range(2):
            runner.release(slot)
        one, other = (start(runner, prompts[i], i, 2710 + i, logprobs=2, **options) for i in range(2))
        step_together(runner, [one, other], 30)
        used = one.pages[: one.n_cached // PAGE + 1]
        saved = runner.save_pages(used)
        runner.release(0)
        assert saved.n_bytes == len(used) * PAGE * runner.memory_plan().kv_bytes_per_token
        overwrite = start(runner, prompts[5], 0, 2720)
        step_together(runner, [other, overwrite], 20)
        one.slot, one.pages = 3, pages_of(runner, 3)
        runner.load_pages(saved, one.pages[: len(used)])
        step_together(runner, [overwrite, one, other], 30)
        step_together(runner, [one], 20)
        assert one.output_ids == whole[0].output_ids
        assert other.output_ids == whole[1].output_ids[: len(other.output_ids)]


def test_copied_pages_are_the_same(prompts):
    with alike(BUNDLED_MODEL, max_sequences=4) as runner:
        prompt = (prompts[7] * 20)[:200]
        one = start(runner, prompt, 0, 2800)
        target = pages_of(runner, 2)
        runner.copy_pages(list(zip(one.pages[:4], target[:4], strict=True)))
        two = new_sequence(runner, prompt, 1, 2801, target)
        two.n_cached, two.output_ids = one.n_cached, list(one.output_ids)
        step_together(runner, [one, two], 70)
        assert one.output_ids == two.output_ids


def test_a_step_cut_short_is_repeated(prompts, monkeypatch):
    """An interrupt between launch and result: the same work again gives the same tokens, also for the others."""
    with alike(BUNDLED_MODEL, max_sequences=2) as runner:
        alone = [token_ids(generate(runner, prompt, 40)) for prompt in prompts[:2]]
        rows = [start(runner, prompts[slot], slot, 2900 + slot) for slot in range(2)]
        machine, seats = runner._machine, runner._seats
        for n, owner, name in ((3, seats, "read"), (2, seats, "seat"), (4, seats, "read"), (1, machine, "flush")):
            step_together(runner, rows, n)
            real = getattr(owner, name)

            def cut_short(*args, real=real):
                real(*args)
                raise KeyboardInterrupt

            monkeypatch.setattr(owner, name, cut_short)
            with pytest.raises(KeyboardInterrupt):
                step_together(runner, rows, 1)
            monkeypatch.undo()
        step_together(runner, rows, 5)
        assert [one.output_ids for one in rows] == [text[: len(rows[0].output_ids)] for text in alone]


def test_mixed_steps_give_everyone_his_own_text(prompts):
    """Prompt pieces of several sequences in one batch, beside running ones, in every bucket up to 64."""
    with alike(BUNDLED_MODEL, max_sequences=64, prefill_chunk=96) as runner:
        alone = [token_ids(generate(runner, prompt, 30)) for prompt in prompts]
        running, waiting = [], [new_sequence(runner, prompts[i % 8], i, 3100 + i) for i in range(64)]
        for turn in range(40):
            work = [Work(one, one.output_ids[-1:], one.n_cached, True, decode=True) for one in running]
            joining, waiting = waiting[: turn % 7], waiting[turn % 7 :]
            cut = 5
            for one in joining:  # the first five tokens in a step of their own
                if len(one.prompt_ids) > cut:
                    runner.step([Work(one, one.prompt_ids[:cut], 0, False)])
                    one.n_cached = cut
                work.append(Work(one, one.prompt_ids[one.n_cached :], one.n_cached, True))
            for item, sample in zip(work, runner.step(work) if work else [], strict=True):
                item.sequence.n_cached += len(item.token_ids)
                item.sequence.output_ids.append(sample.token_id)
            running += joining
            if turn % 5 == 4 and len(running) > 10:
                runner.release(running.pop(3).slot)
        assert not waiting
        for one in running:
            text = alone[(one.request_id - 3100) % 8]
            assert one.output_ids[:30] == text[: len(one.output_ids)], one.request_id


# ---- memory -------------------------------------------------------------------------------------------------------


def test_padded_rows_write_nothing(prompts):
    with opened(BUNDLED_MODEL, max_sequences=8, context_length=256) as runner:
        with runner._running():
            for array in (array for layer in runner._machine.cache.layers for array in layer.paged):
                array.fill(7.0)
        samples = generate(runner, prompts[0], 100, slot=5)
        used = len(prompts[0]) + len(samples) + MOST_AHEAD - 1  # steps on their way
        with runner._running():
            pages = [pages_of(runner, slot) for slot in range(8)]
            for array in (array for layer in runner._machine.cache.layers for array in layer.paged):
                content = array.get().astype(np.float32)  # (N, K, PAGE, width)
                for slot in range(8):
                    rows = content[pages[slot]].transpose(0, 2, 1, 3).reshape(-1, content.shape[1], content.shape[3])
                    untouched = rows[used:] if slot == 5 else rows
                    assert (untouched == 7.0).all(), slot
                    assert slot != 5 or (rows[: used - MOST_AHEAD] != 7.0).any(axis=(1, 2)).all()


def test_memory_is_constant_while_running(prompts):
    with opened(BUNDLED_MODEL, max_sequences=4) as runner:
        sequences = [start(runner, prompts[slot], slot, 5000 + slot) for slot in range(4)]
        step_together(runner, sequences, 3)
        used, (pool, others, process) = runner._gpu.pool.used_bytes(), own_bytes(runner)
        step_together(runner, sequences, 100)
        assert runner._gpu.pool.used_bytes() == used
        assert own_bytes(runner)[:2] == (pool, others)
        assert own_bytes(runner)[2] <= process + (2 << 20)


def test_the_plan_covers_what_is_allocated():
    with opened(BUNDLED_MODEL, max_sequences=4, context_length=2048) as runner:
        plan = runner.memory_plan()
        assert runner.pool_bytes() <= plan.weights_bytes + plan.kv_bytes + plan.scratch_bytes
        assert runner.pool_bytes() >= plan.weights_bytes + plan.kv_bytes


def test_closing_gives_the_memory_back(prompts):
    """This process's memory alone: other programs may use the card meanwhile."""
    with opened(BUNDLED_MODEL, max_sequences=8, context_length=4096) as runner:  # modules and cuBLAS stay loaded
        first = fingerprint(generate(runner, prompts[0] * 8, 10, logprobs=2))
    gc.collect()
    before = own_bytes(runner)
    assert before[0] == 0
    for _ in range(2):
        with opened(BUNDLED_MODEL, max_sequences=8, context_length=4096) as runner:
            assert fingerprint(generate(runner, prompts[0] * 8, 10, logprobs=2)) == first
            taken, others, process = own_bytes(runner)
        assert taken > (16 << 20)
        assert others == before[1]
        assert not before[2] or process >= before[2] + taken - (4 << 20)  # the driver may have freed some of its own
        gc.collect()
        after = own_bytes(runner)
        assert after[:2] == before[:2]
        assert after[2] <= before[2] + (4 << 20)
        runner.close()  # a second time does nothing


def test_two_models_at_once(prompts, tmp_path):
    other = typed_model(tmp_path, GGMLType.Q5_K)
    ids = list(range(5, 40))
    with opened(BUNDLED_MODEL) as runner:
        big = token_ids(generate(runner, prompts[0], 30))
    with opened(other) as runner:
        small = token_ids(generate(runner, ids, 30))
    with opened(BUNDLED_MODEL) as first, opened(other) as second, opened(BUNDLED_MODEL, kv_type="f32") as third:
        a, b, c = start(first, prompts[0], 0, 1), start(second, ids, 0, 1), start(third, prompts[0], 0, 1)
        for _ in range(29):
            for runner, one in ((first, a), (second, b), (third, c)):
                step_together(runner, [one], 1)
        second.close()
        assert nmse(third.logits(prompts[2]), cpu_logits(third.model, prompts[2])) < 1e-6
    assert (a.output_ids, b.output_ids) == (big, small)


# ---- limits and errors --------------------------------------------------------------------------------------------


def test_a_context_filled_to_the_last_position():
    with LLM(device="cuda", context_length=70) as llm:
        result = llm.generate("Once upon a time", SamplingParams(temperature=0, ignore_eos=True))
        assert len(result.prompt_token_ids) + len(result.token_ids) == 70
        assert result.finish_reason == "length"
        again = llm.generate("Once upon a time", SamplingParams(temperature=0, ignore_eos=True))
        assert again.token_ids == result.token_ids
        one_left = llm.generate([5] * 69, SamplingParams(max_tokens=1, temperature=0))
        assert len(one_left.token_ids) == 1
        with pytest.raises(ContextFullError):
            llm.generate([5] * 70)
        assert llm.logits([5] * 70).shape[0] == 70
        with pytest.raises(ContextFullError):
            llm.logits([5] * 71)
    with LLM(device="cuda", context_length=256, max_sequences=2) as llm:
        longer = llm.generate("Once upon a time", SamplingParams(max_tokens=100, temperature=0, ignore_eos=True))
    assert longer.token_ids[: len(result.token_ids)] == result.token_ids


def test_a_context_of_whole_pages_is_filled():
    """To run ahead a sequence gets a page behind its context, if it ends with a page; no kernel reads it."""
    with LLM(device="cuda", context_length=128) as llm:
        for length in (60, 64, 126, 127):
            result = llm.generate([5] * length, SamplingParams(temperature=0, ignore_eos=True))
            assert len(result.token_ids) == 128 - length


def test_a_full_slot_beside_a_running_one(prompts):
    with alike(BUNDLED_MODEL, max_sequences=2, context_length=64) as runner:
        alone = token_ids(generate(runner, prompts[1], 50))
        long = start(runner, (prompts[7] * 10)[:60], 0, 6000)
        short = start(runner, prompts[1], 1, 6001)
        step_together(runner, [long, short], 3)
        runner.release(0)
        step_together(runner, [short], 40)
        assert short.output_ids == alone[:44]


def test_a_context_too_large_says_what_fits():
    with pytest.raises(DeviceError) as error:
        LLM(device="cuda", context_length=400_000_000)
    text = str(error.value)
    assert re.search(r"needs [\d.]+ GiB of GPU memory with 400000000 tokens", text)
    assert re.search(r"[\d.]+ GiB are free: the largest context that fits is \d+ tokens", text)
    with LLM(device="cuda") as llm:  # nothing was taken
        assert llm.generate("A", SamplingParams(max_tokens=3)).token_ids


def test_fewer_pages_where_not_all_fit():
    import cupy

    free = cupy.cuda.runtime.memGetInfo()[0]
    with opened(BUNDLED_MODEL, context_length=64) as runner:
        per_token = runner.memory_plan().kv_bytes_per_token
    context = int(free / per_token / 3.5) // 64 * 64
    if context > 20_000_000:
        pytest.skip("the card is too large for this model to fill")
    with opened(BUNDLED_MODEL, context_length=context, max_sequences=8) as runner:
        assert context <= runner.n_pages * PAGE < 4 * context
        assert generate(runner, [5, 6], 3)


def test_weights_that_give_no_logits(tmp_path):
    """Damaged weights end in an error that names the file as the cause, and the next model runs."""
    from engine.errors import ModelFileError
    from tests.support.models.gguf_builder import build_gguf, tiny_llama_parts

    meta, tensors = tiny_llama_parts()
    tensors["blk.1.ffn_down.weight"][3, 5] = np.nan
    path = tmp_path / "damaged.gguf"
    path.write_bytes(build_gguf(meta, tensors))
    with opened(path) as runner, pytest.raises(ModelFileError, match="NaN"):
        generate(runner, [1, 2, 3], 4)


def test_the_way_through_the_facade():
    """Stop strings, streaming and cancelling while the device is ahead."""
    params = SamplingParams(max_tokens=60, temperature=0)
    with LLM(device="cuda") as llm:
        assert "cuda:0" in llm.device
        whole = llm.generate("Once upon a time", params)
        stop = whole.text[40:46]
        stopped = llm.generate("Once upon a time", SamplingParams(max_tokens=60, temperature=0, stop=(stop,)))
        assert stopped.finish_reason == "stop"
        assert stopped.text == whole.text[: whole.text.index(stop)]
        assert "".join(chunk.text for chunk in llm.stream("Once upon a time", params)) == whole.text
        stream = llm.stream("The sea", SamplingParams(max_tokens=50))
        next(iter(stream))
        stream.close()
        assert llm.generate("Once upon a time", params).text == whole.text
        assert [result.text for result in llm.generate(["Once upon a time"] * 3, params)] == [whole.text] * 3


CONSTRAINTS = [
    JsonSchema({"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a", "b"]}),
    Regex("[A-Z][a-z]{2,9}( [a-z]{1,8}){3,9}[.]"),
    Choice(["red apples", "green apples", "a pear"]),
    None,
    None,
]


def constrained(index, temperature=0.9, max_tokens=40, **more):
    return SamplingParams(
        constraint=CONSTRAINTS[index % 5],
        seed=index,
        temperature=temperature,
        max_tokens=max_tokens,
        logprobs=2,
        **more,
    )


def test_constrained_texts_are_those_of_the_cpu():
    """Without random numbers: a constraint leaves unlikely tokens side by side, and nearly equal ones change places."""
    settings = [constrained(i, 0, 12, free_logprobs=i % 2 == 0) for i in range(20)]
    with LLM(device="cpu", exact=True) as llm:
        wanted = llm.generate(PROMPTS[:4] * 5, settings)
    with LLM(device="cuda") as llm:
        found = llm.generate(PROMPTS[:4] * 5, settings)
    assert [r.text for r in found] == [r.text for r in wanted]
    for one, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose([s.logprob for s in one.logprobs], [s.logprob for s in expected.logprobs], atol=5e-3)


def test_constrained_texts_are_the_same_alone_and_among_others():
    settings = [constrained(i, free_logprobs=i % 2 == 0) for i in range(20)]
    with LLM(device="cuda", deterministic=True) as llm:
        alone = [llm.generate(prompt, each) for prompt, each in zip(PROMPTS[:4] * 5, settings, strict=True)]
        together = llm.generate(PROMPTS[:4] * 5, settings)
    with LLM(device="cuda", deterministic=True, context_length=128, cache_tokens=512) as llm:  # preempted as well
        crowded = llm.generate(PROMPTS[:4] * 5, settings)
    for others in (together, crowded):
        assert [(r.token_ids, r.logprobs) for r in others] == [(r.token_ids, r.logprobs) for r in alone]


def test_forced_tokens_are_rows_with_the_bits_of_steps():
    """Fed together or drawn one at a time, alone, beside free sequences, and preempted."""
    names = {"type": "object", "properties": {f"the_name_of_field_{i}": {"enum": ["yes", "no"]} for i in range(4)}}
    schema = names | {"required": list(names["properties"]), "additionalProperties": False}
    bound = [SamplingParams(constraint=JsonSchema(schema), seed=i, max_tokens=150, logprobs=1) for i in range(6)]
    free = [SamplingParams(seed=i, max_tokens=60, ignore_eos=True, logprobs=1) for i in range(6)]
    settings, prompts = bound + free, PROMPTS[:6] * 2
    found = []
    with LLM(device="cuda", deterministic=True) as llm:
        for shortest in (1 << 30, 2):
            with llm.exclusive_runner() as runner:
                runner.shortest_piece = shortest
            found.append([llm.generate(prompt, each) for prompt, each in zip(prompts, settings, strict=True)])
            found.append(llm.generate(prompts, settings))
    with LLM(device="cuda", deterministic=True, context_length=256, cache_tokens=768) as llm:
        found.append(llm.generate(prompts, settings))
    texts = [[(one.token_ids, one.logprobs) for one in results] for results in found]
    assert all(one == texts[0] for one in texts)
    assert sum(sample.logprob == 0 for _, logprobs in texts[0][:6] for sample in logprobs) > 100


def test_a_constraint_that_fails_ends_its_request_alone(monkeypatch):
    from engine.constraints.matcher import GrammarMask

    inside = GrammarMask.bits

    def bits(self, output_ids):
        if len(output_ids) == 3:
            raise EngineError("the constraint of this request cannot go on: test")
        return inside(self, output_ids)

    free = SamplingParams(max_tokens=20, temperature=0)
    with LLM(device="cuda", deterministic=True) as llm:
        wanted = llm.generate("The sea", free).text
        monkeypatch.setattr(GrammarMask, "bits", bits)
        failing, running = llm.stream("A", constrained(1)), llm.stream("The sea", free)
        assert "".join(chunk.text for chunk in running) == wanted
        with pytest.raises(EngineError, match="cannot go on"):
            failing.result()


def test_sixty_four_requests_in_too_few_pages_get_the_text_of_one_alone():
    """The whole engine: prompts shared and cut, sequences swapped out and back, one given up, all in one batch."""
    params = SamplingParams(max_tokens=90, temperature=0.8, seed=3, ignore_eos=True, logprobs=0)
    texts = [f"{PROMPTS[i % 8]} {i % 16} " * (1 + i % 5) for i in range(64)]
    with LLM(device="cuda", context_length=512, deterministic=True) as llm:
        alone = [llm.generate(text, params) for text in texts[:16]]
    with LLM(device="cuda", context_length=512, cache_tokens=2048, deterministic=True) as llm:
        streams = [llm.stream(text, params) for text in texts]
        given_up = streams.pop(20)
        next(iter(given_up))
        given_up.close()
        together = [stream.result() for stream in streams]
        del texts[20]
    singles = dict(zip(texts[:16], alone, strict=True))
    for text, result in zip(texts, together, strict=True):
        if text in singles:
            assert result.token_ids == singles[text].token_ids, text
            assert result.logprobs == singles[text].logprobs, text


def test_sequences_that_change_slots_keep_their_text(monkeypatch):
    monkeypatch.setattr("engine.scheduling.slots.PATIENCE", 0)
    lengths = (10, 40, 15, 90, 20, 25, 70, 30, 5, 60)
    settings = [SamplingParams(max_tokens=n, temperature=0.8, seed=n, ignore_eos=True, logprobs=0) for n in lengths]
    with LLM(device="cuda", context_length=512, deterministic=True) as llm:
        alone = [llm.generate(f"{PROMPTS[i % 8]} {i}", one) for i, one in enumerate(settings)]
        streams = [llm.stream(f"{PROMPTS[i % 8]} {i}", one) for i, one in enumerate(settings)]
        for stream, expected in zip(streams, alone, strict=True):
            result = stream.result()
            assert result.token_ids == expected.token_ids
            assert result.logprobs == expected.logprobs


def test_a_profile_leaves_no_trace(prompts):
    with opened(BUNDLED_MODEL, max_sequences=4) as runner:
        text = fingerprint(generate(runner, prompts[0], 30, logprobs=2))
        held = runner._gpu.pool.used_bytes()
        times = {one.brick: one for one in runner.profile(100, 3, repeats=3)}
        assert list(times) == [
            *("launch", "embed", "attn_qkv", "attention", "attn_output"),
            *("ffn_gate_up", "ffn_down", "head", "sample", "step"),
        ]
        assert all(one.seconds > 0 for one in times.values())
        layers, read = len(runner.config.layers), times["attention"].n_bytes
        assert times["attention"].calls == layers
        assert read == 3 * 101 * runner.memory_plan().kv_bytes_per_token
        assert runner._gpu.pool.used_bytes() == held
        assert fingerprint(generate(runner, prompts[0], 30, logprobs=2)) == text
        first = start(runner, prompts[0], 0, 7000)
        for rows, depth in ((5, 0), (1, 512), (0, 0)):
            with pytest.raises(InvalidRequestError, match="allowed are 1 to 4 sequences and a depth of 0 to 510"):
                runner.profile(depth, rows)
        with pytest.raises(InvalidRequestError, match="idle model"):
            runner.profile(0, 1)
        step_together(runner, [first], 5)
        assert first.output_ids == [token for token, *_ in text[:6]]


def test_read_bandwidth_is_plausible():
    with opened(BUNDLED_MODEL) as runner:
        assert 20e9 < runner.read_bandwidth() < 20e12
