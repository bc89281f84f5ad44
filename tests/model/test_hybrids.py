"""Layers of several kinds in one model, on the CPU: mixers against loops in float64, and states in the cache."""

import itertools

import numpy as np
import pytest

from engine.cpu.backend import CpuBackend
from engine.cpu.caches.model import KVCache
from engine.cpu.recurrent import lightning, ngrams, plamo_2, rwkv
from engine.cpu.recurrent.mix import mix_recurrent
from engine.cpu.recurrent.tools import Tools
from engine.cpu.reference import normalize
from engine.cpu.steps.immediate import Immediate
from engine.cpu.steps.recurrence import CompiledRecurrence
from engine.errors import ModelFileError
from engine.gguf.quants import dequantize
from engine.gguf.reader import open_gguf
from engine.gguf.types import GGMLType
from engine.model.batch import Batch, Outputs, Span
from engine.model.loader import load_model
from tests.support.backends import backends, feed
from tests.support.models import rwkv_models
from tests.support.models.gguf_builder import bpe_tokenizer, build_gguf, pack
from tests.support.models.hybrid_models import FAMILIES, WIDTH, tiny_hybrid, tiny_hybrid_parts
from tests.support.models.recurrent_loops import LOOPS
from tests.support.models.recurrent_loops import delta_net as delta_net_loop

TOKENS = np.random.default_rng(5).integers(0, 256, 45).tolist()


RECORDED = ("lfm2", "jamba", "mamba2", "falcon-h1", "nemotron_h", "qwen35")
"""Families whose decode steps are recorded on the CPU."""

SMALL = {"ssm_conv1d", "ssm_a", "ssm_d", "ssm_norm", "conv"}
"""Parts of names of arrays that stay in float32."""


@pytest.fixture
def opened(tmp_path):
    """Opens backends over tiny models; closes all."""
    numbers = itertools.count()
    with backends() as open_backend:
        yield lambda family, **options: open_backend(tiny_hybrid(tmp_path / f"{next(numbers)}.gguf", family), **options)


def linear(projection, x):
    weight = projection.weight
    y = x @ dequantize(weight.raw, weight.type).reshape(weight.shape).T
    return y if projection.bias is None else y + projection.bias


def mixed_by(meta, tensors, path, x):
    """What the first layer's recurrent mixer gives for x in three pieces."""
    path.write_bytes(build_gguf(meta, tensors))
    with open_gguf(path) as gguf:
        model = load_model(gguf)
        layer = model.weights.layers[0]
        cache = KVCache(model.config.memories, context_length=64, kv_type="f32")
        parts = []
        for place, (start, stop) in enumerate(((0, 7), (7, 8), (8, len(x)))):
            span = Span(slot=0, row=0, n_rows=stop - start, n_past=start, place=place)
            cache.reserve([span])
            tools = Tools(linear, lambda y, norm: y if norm is None else normalize(y, norm), cache, 0, [span])
            parts.append(mix_recurrent(layer.config.recurrent_part, layer.recurrent, x[start:stop], tools))
        return np.concatenate(parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixers_are_their_definitions(family, tmp_path):
    meta, tensors = tiny_hybrid_parts(family)
    x = np.random.default_rng(1).normal(size=(20, WIDTH)).astype(np.float32)
    own = {name.removeprefix("blk.0."): one.astype(np.float64) for name, one in tensors.items() if "blk.0." in name}
    truth = (LOOPS | rwkv_models.LOOPS)[family](x.astype(np.float64), own)
    found = mixed_by(meta, tensors, tmp_path / "tiny.gguf", x)
    assert ((found - truth) ** 2).mean() / (truth**2).mean() < 1e-11


def test_older_files_of_gated_delta_rules_have_rows_by_key_head(tmp_path):
    """ssm_in holds q, k, v and gate of one key head after the other; ssm_ba beta and alpha likewise."""
    meta, tensors = tiny_hybrid_parts("qwen35")
    own = {name.removeprefix("blk.0."): one for name, one in tensors.items() if name.startswith("blk.0.")}
    meta = {key.replace("qwen35.", "qwen3next."): one for key, one in meta.items() if "sections" not in key}
    meta["general.architecture"] = "qwen3next"
    meta |= {"qwen3next.expert_count": 2, "qwen3next.expert_used_count": 1, "qwen3next.expert_feed_forward_length": 16}
    q, k, v = np.split(own["attn_qkv.weight"], (32, 64))
    halves = [np.split(part, 2) for part in (q, k, v, own["attn_gate.weight"])]
    older = {name: one for name, one in tensors.items() if not name.startswith("blk.") or "ffn" not in name}
    for name in ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha"):
        del older[f"blk.0.{name}.weight"]
    older["blk.0.ssm_in.weight"] = np.concatenate([part[group] for group in range(2) for part in halves])
    pairs = [np.split(own[f"ssm_{name}.weight"], 2) for name in ("beta", "alpha")]
    older["blk.0.ssm_ba.weight"] = np.concatenate([part[group] for group in range(2) for part in pairs])
    for i in range(2):
        for name, shape in {
            "ffn_gate_inp": (2, WIDTH), "ffn_gate_exps": (2, 16, WIDTH), "ffn_up_exps": (2, 16, WIDTH),
            "ffn_down_exps": (2, WIDTH, 16), "ffn_gate_inp_shexp": (WIDTH,), "ffn_gate_shexp": (96, WIDTH),
            "ffn_up_shexp": (96, WIDTH), "ffn_down_shexp": (WIDTH, 96),
        }.items():  # fmt: skip
            older[f"blk.{i}.{name}.weight"] = np.zeros(shape, np.float32)
    x = np.random.default_rng(1).normal(size=(20, WIDTH)).astype(np.float32)
    truth = delta_net_loop(x.astype(np.float64), {n: one.astype(np.float64) for n, one in own.items()}, grouped=True)
    found = mixed_by(meta, older, tmp_path / "older.gguf", x)
    assert ((found - truth) ** 2).mean() / (truth**2).mean() < 1e-11


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_pieces_or_batches(opened, family):
    backend = opened(family, kv_type="f32", reference=False)
    whole = feed(backend, 0, TOKENS)
    one_by_one = np.concatenate([feed(backend, 1, [token], i) for i, token in enumerate(TOKENS)])
    np.testing.assert_allclose(one_by_one, whole, rtol=1e-3, atol=1e-4)
    parts, start = [], 0
    for size in (1, 2, 7, 16, 17, 2):  # beside a sequence at another place
        batch = [(2, TOKENS[:3], 0, Outputs.NONE), (0, TOKENS[start : start + size], start, Outputs.ALL)]
        parts.append(backend.forward(Batch.build(batch)))
        start += size
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("family", RECORDED)
def test_recorded_steps_give_the_bits_of_bricks(tmp_path, family, bits):
    """Of one sequence and of two, step after step; matrices multiplied in integers, too."""
    meta, tensors = tiny_hybrid_parts(family)
    names = [name for name, one in tensors.items() if one.ndim == 2 and SMALL.isdisjoint(name.split("."))]
    tensors |= {name: pack(tensors[name], GGMLType.Q8_0) for name in names}
    (tmp_path / "tiny.gguf").write_bytes(build_gguf(meta, tensors))
    with backends() as open_backend:
        ways = [open_backend(tmp_path / "tiny.gguf", reference=False, activation_bits=bits) for _ in range(2)]
        step_by_step(*ways)


def step_by_step(recorded, bricks):
    assert recorded._programs is not None
    bricks.__dict__["_programs"] = None
    for start in range(6):
        parts = [(slot, [7 + slot + start], start, Outputs.ALL) for slot in range(1 + start % 2)]
        parts += [(1, TOKENS[: start + 1], 0, Outputs.NONE)] if start % 2 == 0 else []
        found, expected = (one.forward(Batch.build(parts)) for one in (recorded, bricks))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("family", "module", "name"),
    [
        ("lfm2", Immediate, "recur"),
        ("jamba", Immediate, "recur"),
        ("falcon-h1", Immediate, "recur"),
        ("kimi-linear", CompiledRecurrence, "convolve"),
        ("qwen35", Immediate, "recur"),
        ("kimi-linear", CompiledRecurrence, "delta_rule"),
        ("rwkv6", rwkv, "decayed_products"),
        ("rwkv7", rwkv, "corrected_products"),
        ("rwkv7", rwkv, "_change"),
        ("minimax-01", lightning, "decayed_sum"),
        ("qwen4exp", ngrams, "table_rows"),
        ("plamo2", plamo_2, "grouped_scan"),
    ],
)
@pytest.mark.parametrize("call", range(2))
def test_a_step_cut_short_anywhere_can_be_repeated(opened, monkeypatch, family, module, name, call):
    """Two sequences, one reading a prompt and one decoding."""
    ways = [opened(family), opened(family)]
    for one in ways:
        feed(one, 0, TOKENS[:9], place=0)
        feed(one, 1, TOKENS[:5], place=0)
    batch = Batch.build([(0, [7], 9, Outputs.ALL, None, 1), (1, TOKENS[5:12], 5, Outputs.ALL, None, 1)])
    original, calls = getattr(module, name), []

    def failing(*arguments, **settings):
        calls.append(name)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing)
        with pytest.raises(KeyboardInterrupt):
            ways[0].forward(batch)
    np.testing.assert_array_equal(ways[0].forward(batch), ways[1].forward(batch))
    behind = Batch.build([(0, [8, 9], 10, Outputs.ALL, None, 2), (1, [1], 12, Outputs.ALL, None, 2)])
    np.testing.assert_array_equal(ways[0].forward(behind), ways[1].forward(behind))


@pytest.mark.parametrize("family", ["qwen35", "lfm2"])
def test_recorded_steps_have_the_bits_of_steps_run_apart(opened, family):
    """A decode step alone is a program; beside a prompt it is run step by step. Again and from position 0, the same."""
    backend, reference = opened(family, reference=False), opened(family, reference=True)
    assert backend._programs is not None
    feed(reference, 0, TOKENS[:9])
    for slot in (0, 1):
        feed(backend, slot, TOKENS[:9])
    steps = [(slot, [TOKENS[9]], 9, Outputs.ALL, None, 1) for slot in (0, 1)]
    recorded = backend.forward(Batch.build(steps))
    np.testing.assert_array_equal(backend.forward(Batch.build(steps)), recorded)
    apart = backend.forward(Batch.build([*steps, (2, TOKENS[:4], 0, Outputs.NONE, None, 0)]))
    np.testing.assert_array_equal(apart, recorded)
    np.testing.assert_allclose(recorded[1], feed(reference, 0, TOKENS[9:10], 9)[0], rtol=1e-3, atol=1e-4)
    for position, token in enumerate(TOKENS[:10]):
        alone = backend.forward(Batch.build([(2, [token], position, Outputs.ALL, None, position)]))
    np.testing.assert_allclose(alone, recorded[:1], rtol=1e-3, atol=1e-4)


def test_layers_keep_what_their_parts_need(opened):
    both, one_part = opened("falcon-h1").cache, opened("nemotron_h").cache
    assert [(layer.bytes_per_token > 0, layer.bytes_per_state > 0) for layer in both.layers] == [(True, True)] * 2
    found = [(layer.bytes_per_token > 0, layer.bytes_per_state > 0) for layer in one_part.layers]
    assert found == [(False, True), (True, False), (False, False)]


@pytest.mark.parametrize(
    ("family", "key", "value", "words"),
    [
        ("mamba2", "ssm.group_count", 3, "each must be a multiple of the next"),
        ("qwen35", "ssm.inner_size", 128, "allowed is heads"),
        ("kimi-linear", "attention.head_count", np.array([0, 0], np.int32), "head_count is 0 in all layers|0 heads"),
        ("lfm2", "shortconv.l_cache", 1, "allowed is an integer from 2"),
        ("rwkv7", "wkv.head_size", 24, "divides embedding_length 64"),
        ("rwkv6", "attention.head_count_kv", 3, "divides the 4 heads"),
        ("minimax-01", "attention.value_length", 16, "needs the same width for both"),
        ("kimi-k3", "activation.situ_beta", 0.0, "situ_beta is 0; allowed is a number above"),
        ("glm5-next", "attention.indexer.kpool_select_tail", False, "is false; supported is true"),
        ("glm5-next", "attention.indexer.kpool", 16, "must be at least the second"),
        ("glm5-next", "attention.indexer.types", np.array([0, 0], np.int32), "none comes before it"),
        ("qwen4exp", "hyper_connection.count", 1, "allowed is an integer from 2"),
        ("qwen4exp", "attention.indexer.top_k", 3, "must be at least the second"),
        ("qwen4exp", "ple.head_offsets", np.array([0, 40, 80, 500], np.uint64), "has 160 rows; .* calls for 531"),
        ("qwen4exp", "ple.layer_multipliers", np.array([1, 2], np.uint64), "holds 2 values; allowed are 3 or more"),
        ("qwen4exp", "ple.head_vocab_sizes", np.array([40, 0, 9, 9], np.uint64), "allowed is an integer from 1"),
        ("plamo2", "ssm.time_step_rank", 3, "allowed is a multiple of the heads"),
        ("bailingmoe3", "kda.gate_lower_bound", 1.0, "from -1e[+]06 to 0"),
    ],
)
def test_wrong_files_are_refused(tmp_path, family, key, value, words):
    meta, tensors = tiny_hybrid_parts(family)
    path = tmp_path / "wrong.gguf"
    path.write_bytes(build_gguf(meta | {f"{family}.{key}": value}, tensors))
    with open_gguf(path) as gguf, pytest.raises(ModelFileError, match=words):
        load_model(gguf)


def plain_model(arch, n_layers, left_out=(), **stated):
    """Metadata and tensors of a small model of attention and gated feed-forward parts; some layers have neither."""
    rng = np.random.default_rng(3)
    meta = {"general.architecture": arch, f"{arch}.block_count": n_layers, f"{arch}.context_length": 64}
    meta |= {f"{arch}.embedding_length": 32, f"{arch}.attention.layer_norm_rms_epsilon": 1e-5}
    meta |= {f"{arch}.attention.head_count": 2, f"{arch}.feed_forward_length": 64}
    meta |= {f"{arch}.{key.replace('__', '.')}": value for key, value in stated.items()}
    square = ["attn_q", "attn_k", "attn_v", "attn_output"]
    shapes = dict.fromkeys(square, (32, 32)) | {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes |= {"attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {"token_embd.weight": rng.normal(size=(272, 32)), "output_norm.weight": np.ones(32)}
    for i in set(range(n_layers)) - set(left_out):
        tensors |= {f"blk.{i}.{name}.weight": rng.normal(size=shape) / 6 for name, shape in shapes.items()}
    return meta | bpe_tokenizer(272), {name: one.astype(np.float32) for name, one in tensors.items()}


def test_layers_without_heads_and_columns_do_nothing(tmp_path):
    """The model of three layers of which the second has no part is the one of two layers."""
    holes = {
        "attention.head_count": [2, 0, 2],
        "attention.head_count_kv": [1, 0, 1],
        "feed_forward_length": [64, 0, 64],
    }
    holes = {key.replace(".", "__"): np.array(value, np.int32) for key, value in holes.items()}
    found = []
    for name, (meta, tensors) in {
        "three": plain_model("deci", 3, [1], **holes),
        "two": plain_model("deci", 2, attention__head_count_kv=1),
    }.items():
        tensors = {n: one[:16] if n.endswith(("attn_k.weight", "attn_v.weight")) else one for n, one in tensors.items()}
        (tmp_path / name).write_bytes(build_gguf(meta, tensors))
        with open_gguf(tmp_path / name) as gguf:
            backend = CpuBackend(load_model(gguf), threads=1, max_sequences=1)
            found.append(feed(backend, 0, TOKENS))
            backend.close()
            del backend
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(("n_layers", "rotates", "alibi"), [(32, True, 0.0), (40, False, 8.0), (2, False, 0.0)])
def test_baichuan_has_rotation_or_biases_by_its_number_of_layers(tmp_path, n_layers, rotates, alibi):
    path = tmp_path / "model.gguf"
    path.write_bytes(build_gguf(*plain_model("baichuan", n_layers)))
    with open_gguf(path) as gguf:
        attention = load_model(gguf).config.layers[0].attention
    assert (attention.rope is not None, attention.alibi) == (rotates, alibi)
