"""Logits and text of the GPU runner against the CPU reference, for every kind of model it runs."""

from pathlib import Path

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.api.llm import BUNDLED_MODEL
from engine.api.perplexity import cut, measure
from engine.cuda.formats.layouts import LAYOUTS
from engine.cuda.launch_plan.parts import mixture_parts
from engine.gguf.types import GGMLType
from engine.sampling.sampler import sample
from tests.support.gpu.helpers import (
    cpu_logits,
    decode_logits,
    generate,
    mixed_model,
    nmse,
    opened,
    shared_expert_model,
    token_ids,
    typed_model,
)
from tests.support.models.small_models import CASES, make

pytestmark = pytest.mark.gpu

TOLERANCE = {"f16": 1e-5, "f32": 1e-6}
"""Of logits against float32 with a float32 cache: keys and values rounded to float16, or nothing but the order of sums
and, in prompts, operands rounded to float16."""

SHARP = {"f16": 2e-5, "f32": 6e-6}
"""For prompts of the random models here, whose attention is sharper than a trained one's: float16 operands alone bring
1.2e-6, weights of two scales rounded to float16 and queries rounded likewise as much again each."""

TYPES = [type for type in GGMLType if type.name.startswith(("F", "BF", "Q")) and type is not GGMLType.Q8_1]
TYPES += [GGMLType.IQ1_M, GGMLType.IQ2_XS, GGMLType.IQ3_S, GGMLType.IQ4_XS, GGMLType.TQ1_0, GGMLType.MXFP4]
"""Of formats that are packed alike, one each; products of every type are tested in test_matvec.py."""

DEMO_MODELS = [f"demo-model/tales-{name}.gguf" for name in ("f16", "Q8_0", "Q4_K_M")]
LICENSE = Path(__file__).parents[2] / "LICENSE"
IDS = np.random.default_rng(1).integers(0, 256, 70)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Builds what all files below need side by side; one after the other would take minutes."""
    from engine.cuda.driver import compiler
    from engine.cuda.matrix import matvec_plan

    arch = compiler.device_arch()
    groups = [[type] * n for type in TYPES for n in (1, 3) if type in LAYOUTS]
    groups += [[GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q6_K]]
    batches = (1, matvec_plan.max_batch(arch))
    compiler.prebuild([matvec_plan.build_job(types, batch, arch) for types in groups for batch in batches], arch)


def check(path, ids, *, limit=SHARP):
    """Both ways through the model, with both caches."""
    for kv_type in TOLERANCE:
        with opened(path, kv_type=kv_type) as runner:
            expected = cpu_logits(runner.model, ids)
            prompt, decode = runner.logits(ids), decode_logits(runner, ids)
            assert prompt.shape == decode.shape == expected.shape
            errors = nmse(prompt, expected), nmse(decode, expected)
        assert errors[0] <= limit[kv_type], (kv_type, "prompt", errors)
        assert errors[1] <= TOLERANCE[kv_type], (kv_type, "decode", errors)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_weight_types(tmp_path, type):
    check(typed_model(tmp_path, type), IDS)


def test_mixed_types(tmp_path):
    check(mixed_model(tmp_path), IDS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_parts_of_models(tmp_path, case):
    """Biases, scales, experts, rope styles and scalings, windows: the cases the CPU is held to formulas with."""
    check(make(tmp_path, **case)[2], IDS)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("apart", [False, True])
def test_shared_experts_of_quantized_files(tmp_path, monkeypatch, times, apart):
    """As experts of the stack, for few and for more rows and in prompts, and as a part of their own.

    Scores of these experts are far apart, so what prompts round to float16 counts for more than in the models above.
    """
    if apart:
        monkeypatch.setattr(mixture_parts, "stacked_shared", lambda *_: 0)
    path = shared_expert_model(tmp_path, times)
    for slots in (1, 8):
        with opened(path, kv_type="f32", max_sequences=slots) as runner:
            assert runner._machine.weights.layers[0].moe.plan.routing.n_shared == (0 if apart else times)
            expected = cpu_logits(runner.model, IDS)
            prompt, decode = nmse(runner.logits(IDS), expected), nmse(decode_logits(runner, IDS), expected)
        assert prompt < 1e-4, (slots, prompt)
        assert decode < TOLERANCE["f32"], (slots, decode)


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_grouped_query_attention(tmp_path, kv_heads):
    _, _, path = make(tmp_path, width=512, heads=8, kv_heads=kv_heads)
    check(path, IDS)


@pytest.mark.parametrize("width", [80, 96, 112, 128, 256, 40])
def test_head_widths(tmp_path, width):
    _, _, path = make(tmp_path, width=2 * width, heads=2, kv_heads=1)
    check(path, IDS)


def test_a_window_over_several_pages(tmp_path):
    _, _, path = make(tmp_path, metadata={"attention.sliding_window": 70}, context_length=512)
    check(path, np.random.default_rng(2).integers(0, 256, 300))


def check_demo(path):
    with LLM(device="cpu", exact=True) as llm:
        ids = llm.tokenizer.encode(LICENSE.read_text(encoding="utf-8"))[:160]
    check(path, ids, limit=TOLERANCE)


def test_bundled_model():
    check_demo(BUNDLED_MODEL)


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_demo_models(name, shared_path):
    check_demo(shared_path(name))


@pytest.mark.parametrize(("kv_type", "chunk"), [("f16", None), ("f16", 100), ("f32", None)])
def test_every_number_of_rows(kv_type, chunk):
    """Prompts around the sizes of tiles, pages and chunks, at the start and behind a cache."""
    ids = np.random.default_rng(3).integers(0, 4000, 1000)
    with opened(BUNDLED_MODEL, kv_type=kv_type, context_length=1024, prefill_chunk=chunk) as runner:
        expected = cpu_logits(runner.model, ids)
        for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 256, 511, 513, 1000):
            error = nmse(runner.logits(ids[:n]), expected[:n])
            assert error <= TOLERANCE[kv_type], (n, error)
        for n in (1, 2, 8, 16, 17, 33):  # the same tokens as a second piece, seen through the token drawn behind them
            for first in (1, 63, 64, 65):
                drawn = generate(runner, ids[: first + n], 1, chunk=first if first >= n else n, logprobs=0)
                row = expected[first + n - 1]
                top = np.sort(row)[-2:]
                assert drawn[0].token_id == row.argmax() or top[1] - top[0] < 1e-2


def prompt_of(llm):
    return llm.tokenizer.encode("Once upon a time", add_special=True)


def check_greedy(path, kv_type):
    """Every token is the reference's choice for the same text before it, or all but tied with it."""
    with LLM(path, device="cpu", exact=True) as llm:
        prompt = prompt_of(llm)
    with opened(path, kv_type=kv_type) as runner:
        text = token_ids(generate(runner, prompt, 200))
        logits = cpu_logits(runner.model, prompt + text)[len(prompt) - 1 : -1]
    for place, (row, token) in enumerate(zip(logits, text, strict=True)):
        gap = row.max() - row[token]
        assert row.argmax() == token or gap < 1e-3, f"token {place}: {gap} below the reference's choice"


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_greedy_text(kv_type):
    check_greedy(BUNDLED_MODEL, kv_type)


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_greedy_text_of_the_demo_models(name, shared_path):
    check_greedy(shared_path(name), "f16")


def test_greedy_text_equals_the_cpus():
    params = SamplingParams(max_tokens=90, temperature=0)
    texts = {}
    for device in ("cpu", "cuda"):
        with LLM(device=device, kv_type="f32", exact=True) as llm:
            texts[device] = llm.generate("Once upon a time", params).text
    assert texts["cpu"] == texts["cuda"]


def test_seeded_text():
    """The same seed draws the same tokens; a draw within rounding of the edge between two tokens may differ."""
    options = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
    with LLM(device="cpu", exact=True) as llm:
        prompt = prompt_of(llm)
    differ = total = 0
    with opened(BUNDLED_MODEL, kv_type="f32") as runner:
        for seed in range(5):
            text = token_ids(generate(runner, prompt, 60, seed=seed, **options))
            logits = cpu_logits(runner.model, prompt + text)[len(prompt) - 1 : -1]
            params = SamplingParams(**options)
            for place, row in enumerate(logits):
                history = prompt + text[:place]
                differ += sample(row, params, history=history, output_index=place, seed=seed).token_id != text[place]
                total += 1
    assert differ <= total // 100, f"{differ} of {total} tokens"


def test_log_probabilities():
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=3, prompt_logprobs=2)
    results = []
    for device in ("cpu", "cuda"):
        with LLM(device=device, kv_type="f32", exact=True) as llm:
            results.append(llm.generate("The old man went down to the sea and", params))
    cpu, gpu = results
    assert gpu.token_ids == cpu.token_ids
    assert gpu.prompt_logprobs[0] is None
    pairs = list(zip(gpu.logprobs + gpu.prompt_logprobs[1:], cpu.logprobs + cpu.prompt_logprobs[1:], strict=True))
    for found, expected in pairs:
        assert found.logprob == pytest.approx(expected.logprob, abs=5e-3)
        values = [[value for _, value in sample.top_logprobs] for sample in (found, expected)]
        assert values[0] == pytest.approx(values[1], abs=5e-3)


def check_perplexity(path, text, n_chunks=3):
    values = {}
    for device in ("cpu", "cuda"):
        with LLM(path, device=device, exact=True) as llm:
            *_, last = measure(llm, cut(llm, text, 512)[:n_chunks])
            values[device] = last.value
    assert values["cuda"] == pytest.approx(values["cpu"], rel=5e-4)


def test_perplexity():
    check_perplexity(BUNDLED_MODEL, LICENSE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_perplexity_of_held_out_text(name, shared_path):
    check_perplexity(shared_path(name), shared_path("demo-model/held_out.txt").read_text(encoding="utf-8"))
