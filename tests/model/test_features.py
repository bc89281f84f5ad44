"""Parts that only some families have, each in a tiny model against formulas in float64 written from their papers."""

import math

import numpy as np
import pytest

from engine.config import PAGE
from engine.cpu.backend import CpuBackend
from engine.cpu.caches.model import KVCache
from engine.errors import InvalidRequestError, UnsupportedModelError
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs
from engine.model.config import RopeScaling
from engine.model.loader import load_model
from tests.support.models.feature_models import (
    CASES,
    CPU_CASES,
    LATENT,
    LATENT_CASES,
    MOE,
    NOPE,
    ROPE,
    VALUE,
    NaiveLatent,
    chunks,
    expert_tensors,
    latent,
    learned_positions,
    linear_biases,
    no_norm_weights,
    norms_behind,
    second_norm_renamed,
    shared_norm,
    sinks_and_clamped_gates,
    squared_relu,
)
from tests.support.models.naive_model import (
    ATTENTION,
    CONTEXT,
    FFN,
    FUSED,
    GATED,
    HEAD,
    HEADS,
    NORMS,
    QKV,
    TOKENS,
    VOCAB,
    WIDTH,
    File,
    Naive,
    gelu,
)


def both_ways(folder, file, reference):
    with open_gguf(file.write(folder)) as gguf:
        backend = CpuBackend(load_model(gguf), threads=1, reference=reference, kv_type="f32", max_sequences=2)
        at_once = backend.forward(Batch.build([(0, TOKENS, 0, Outputs.ALL)]))
        single = [backend.forward(Batch.build([(1, [t], i, Outputs.LAST)])) for i, t in enumerate(TOKENS)]
        backend.close()
        del backend
    return at_once, np.concatenate(single)


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "kernels"])
@pytest.mark.parametrize("case", CASES + CPU_CASES, ids=lambda case: case.__name__)
def test_against_the_formulas(tmp_path, case, reference):
    file, facts = case()
    expected = facts.pop("naive", Naive)(file, **facts).logits(TOKENS)
    # GELU passes through float16: a rounding that goes the other way is 5e-4 of one of many summands.
    tolerance = 5e-3 if facts.get("act") is gelu else 2e-4
    for found in both_ways(tmp_path, file, reference):
        np.testing.assert_allclose(found, expected, atol=tolerance)


def test_chunks_of_whole_pages(tmp_path):
    """Kernels attend to the pages of a chunk, whatever pieces the text is read in."""
    file, _ = chunks()
    file.meta |= {"attention.sliding_window": PAGE, "context_length": 4 * PAGE}
    ids = np.random.default_rng(2).integers(0, VOCAB, 2 * PAGE + 20)
    found = {}
    with open_gguf(file.write(tmp_path)) as gguf:
        for reference in (True, False):
            backend = CpuBackend(load_model(gguf), threads=1, reference=reference, kv_type="f32", max_sequences=2)
            found[reference] = backend.forward(Batch.build([(0, ids, 0, Outputs.ALL)]))
            if not reference:
                pieces = [(0, 1), (1, PAGE - 1), (PAGE - 1, PAGE), (PAGE, PAGE + 1), (PAGE + 1, len(ids))]
                parts = [backend.forward(Batch.build([(1, ids[a:b], a, Outputs.ALL)])) for a, b in pieces]
            backend.close()
            del backend
    np.testing.assert_allclose(found[False], found[True], atol=2e-4)
    np.testing.assert_array_equal(np.concatenate(parts), found[False])


@pytest.mark.parametrize(("absorbed", "low_rank_queries"), LATENT_CASES)
def test_latent_attention(tmp_path, absorbed, low_rank_queries):
    file, facts = latent(absorbed, low_rank_queries)
    expected = NaiveLatent(file, **facts).logits(TOKENS)
    for reference in (True, False):
        for found in both_ways(tmp_path, file, reference):
            np.testing.assert_allclose(found, expected, atol=2e-4)


def load(folder, file, **options):
    with open_gguf(file.write(folder)) as gguf:
        return load_model(gguf, **options)


def test_what_latent_attention_caches(tmp_path):
    attention = load(tmp_path, latent(True)[0]).config.layers[0].attention
    cache = KVCache([attention], context_length=CONTEXT, kv_type="f32")
    assert cache.bytes_per_token == 4 * (LATENT + ROPE)
    assert np.shares_memory(*cache.arrays(0))
    assert (attention.n_kv_heads, attention.key_width, attention.value_width) == (1, LATENT + ROPE, LATENT)
    attention = load(tmp_path, latent(False)[0]).config.layers[0].attention
    assert (attention.n_kv_heads, attention.key_width, attention.value_width) == (HEADS, NOPE + ROPE, VALUE)


def test_yarn_sharpens_latent_scores(tmp_path):
    """DeepSeek-V2-Lite: factor 40 and mscale_all_dim 0.707, of which files hold a tenth."""
    file, _ = latent(True)
    file.meta |= {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_log_multiplier": 0.0707,
    }  # fmt: skip
    layer = load(tmp_path, file).weights.layers[0]
    sharpening = (0.1 * 0.707 * math.log(40.0) + 1.0) ** 2
    assert layer.config.attention.scale == pytest.approx(sharpening / math.sqrt(NOPE + ROPE), rel=1e-6)
    assert layer.attention.rope.magnitude == 1.0


def test_long_factors_follow_the_context_of_the_run(tmp_path):
    file = File("phi3", rope__scaling__original_context_length=16, rope__scaling__attn_factor=1.19)
    file.meta["rope.scaling.type"] = "longrope"
    file.layers(matrices=QKV + FUSED, norms=NORMS)
    file.tensors["rope_factors_long.weight"] = np.full(HEAD // 2, 4.0, np.float32)
    file.tensors["rope_factors_short.weight"] = np.full(HEAD // 2, 2.0, np.float32)
    for context, divisor in ((16, 2.0), (17, 4.0)):
        layer = load(tmp_path, file, run_context=lambda trained, context=context: context).weights.layers[0]
        assert layer.config.attention.rope.scaling is RopeScaling.LONGROPE
        assert layer.attention.rope.magnitude == pytest.approx(1.19)
        np.testing.assert_allclose(layer.attention.rope.inv_freq, 10000.0 ** (-np.arange(8) / 8) / divisor)
    gate, up = layer.ffn.gate.weight, layer.ffn.up.weight
    assert np.array_equal(np.concatenate([gate.raw, up.raw]).view(np.float32), file.tensors["blk.0.ffn_up.weight"])
    assert not gate.raw.flags.owndata


def test_learned_positions_end(tmp_path):
    with open_gguf(learned_positions()[0].write(tmp_path)) as gguf:
        model = load_model(gguf)
        with pytest.raises(InvalidRequestError, match="33; this model has learned positions, 32 of them"):
            CpuBackend(model, context_length=33)
        del model


def test_what_old_files_of_minicpm_leave_out(tmp_path):
    """Token vectors times 12, residuals times 1.4 / sqrt(layers), logits over D / 256, as its configuration has it."""
    config = load(tmp_path, File("minicpm").layers(matrices=ATTENTION + GATED, norms=NORMS)).config
    assert (config.embedding_scale, config.logit_scale) == (12.0, 256 / WIDTH)
    assert config.layers[1].residual_scale == pytest.approx(1.4 / math.sqrt(2))
    stated = File("minicpm", embedding_scale=2.0, residual_scale=0.5, logit_scale=9.0)
    config = load(tmp_path, stated.layers(matrices=ATTENTION + GATED, norms=NORMS)).config
    assert (config.embedding_scale, config.layers[0].residual_scale) == (2.0, 0.5)
    assert config.logit_scale == pytest.approx(1 / 9)


def test_next_token_layers_are_left_out(tmp_path):
    keys = {"leading_dense_block_count": 1, "expert_shared_count": 1, **MOE}
    file = File("glm4moe", 2, nextn_predict_layers=1, **keys)
    norms = [NORMS[0], ("post_attention_norm", (WIDTH,)), ("nextn.enorm", (WIDTH,))]
    file.layers(matrices=ATTENTION + GATED, norms=norms)
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.nextn\.enorm\.weight"):
        load(tmp_path, file)
    del file.tensors["blk.0.nextn.enorm.weight"]
    assert load(tmp_path, file).config.n_layers == 1
    for name in ("blk.2.attn_q.weight", "blk.\N{SUPERSCRIPT TWO}.x"):  # beyond the layers there are, or no number
        file.norm(name.removesuffix(".weight"), WIDTH)
        with pytest.raises(UnsupportedModelError, match="no use for these tensors: blk"):
            load(tmp_path, file)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (learned_positions, "position_embd.weight"),
        (learned_positions, "blk.1.attn_qkv.bias"),
        (learned_positions, "blk.0.ffn_norm.bias"),
        (linear_biases, "token_embd_norm.weight"),
        (norms_behind, "blk.2.post_ffw_norm.weight"),
        (sinks_and_clamped_gates, "blk.0.attn_sinks.weight"),
        (sinks_and_clamped_gates, "blk.1.ffn_gate_inp.bias"),
        (sinks_and_clamped_gates, "blk.1.ffn_up_exps.bias"),
        (lambda: latent(True), "blk.0.attn_v_b.weight"),
    ],
)
def test_missing_tensors_are_named(tmp_path, case, name):
    file, _ = case()
    del file.tensors[name]
    with pytest.raises(UnsupportedModelError, match=f"tensor {name} is missing"):
        load(tmp_path, file)


@pytest.mark.parametrize(
    ("case", "name", "shape"),
    [
        (shared_norm, "blk.0.attn_norm.bias", (WIDTH,)),
        (no_norm_weights, "blk.0.attn_norm.weight", (WIDTH,)),
        (norms_behind, "blk.0.attn_norm.weight", (WIDTH,)),
        (squared_relu, "blk.0.ffn_gate.weight", (FFN, WIDTH)),
        (second_norm_renamed, "blk.1.post_ffw_norm.weight", (WIDTH,)),
    ],
)
def test_useless_tensors_are_named(tmp_path, case, name, shape):
    file, _ = case()
    file.add(name, *shape)
    with pytest.raises(UnsupportedModelError, match=f"no use for these tensors: {name}"):
        load(tmp_path, file)


def test_axes_of_position(tmp_path):
    """Text has one position on three axes, so sections change nothing, unless a fourth axis takes part."""
    file = File("qwen2vl", rope__dimension_sections=[2, 3, 3, 0])
    load(tmp_path, file.layers(matrices=ATTENTION + GATED, norms=NORMS))
    file.meta["rope.dimension_sections"] = [2, 2, 2, 2]
    with pytest.raises(UnsupportedModelError, match="fourth axis"):
        load(tmp_path, file)


def test_routing_that_a_family_is_not_known_with(tmp_path):
    file = File("olmoe", expert_weights_norm=False, **MOE)
    norms = [*NORMS, ("attn_q_norm", (WIDTH,)), ("attn_k_norm", (WIDTH // 2,))]
    file.layers(matrices=ATTENTION + expert_tensors(), norms=norms)
    assert load(tmp_path, file).config.layers[1].ffn.normalize is False
    file.meta["expert_weights_norm"] = True
    with pytest.raises(UnsupportedModelError, match="expert_weights_norm is true"):
        load(tmp_path, file)
    file.meta["expert_weights_norm"] = False
    file.meta["expert_gating_func"] = 9
    with pytest.raises(UnsupportedModelError, match="expert_gating_func 9 is not supported; supported are 1"):
        load(tmp_path, file)
