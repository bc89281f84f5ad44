"""The generator of synthetic models: sizes of the real files, well-formed containers, well-scaled weights."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.gguf import FORMATS, GGMLType, dequantize, open_gguf
from scripts import make_synthetic_gguf as synthetic
from scripts.synthetic_models import RECIPES, plan, rope_factors
from scripts.synthetic_shapes import SHAPES

TINY = [name for name in SHAPES if name.startswith("tiny")]


def make(path: Path, name: str, *arguments: str) -> Path:
    synthetic.main([name, "-o", str(path), *arguments])
    return path


# Gigabytes of published files made by llama.cpp; ours lack a few MB of merges.
@pytest.mark.parametrize(
    ("name", "recipe", "published"),
    [
        ("llama-3.2-1b", "Q4_K_M", 0.808),
        ("llama-3.1-8b", "Q4_K_M", 4.92),
        ("llama-3.1-8b", "Q8_0", 8.54),
        ("qwen3-30b-a3b", "Q4_K_M", 18.56),
    ],
)
def test_sizes_are_those_of_llama_cpp(name, recipe, published):
    tensors = plan(SHAPES[name], recipe)
    header = len(synthetic.header(synthetic.metadata(SHAPES[name], name, recipe), tensors))
    assert abs(sum(t.n_bytes for t in tensors) + header - published * 1e9) < 0.006 * published * 1e9


def test_types_of_q4_k_m():
    types = {t.name: t.type.name for t in plan(SHAPES["llama-3.1-8b"], "Q4_K_M")}
    finer = [i for i in range(32) if types[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert finer == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert finer == [i for i in range(32) if types[f"blk.{i}.attn_v.weight"] == "Q6_K"]
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q6_K", "Q4_K")
    assert {types[f"blk.0.{n}.weight"] for n in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up")} == {"Q4_K"}
    assert {types["output_norm.weight"], types["rope_freqs.weight"]} == {"F32"}
    assert {t.name: t.type.name for t in plan(SHAPES["llama-3.2-1b"], "Q4_K_M")}["token_embd.weight"] == "Q6_K"


def test_types_of_a_recurrent_model():
    types = {t.name: t.type.name for t in plan(SHAPES["mamba-2.8b"], "Q4_K_M")}
    assert {types[f"blk.9.{name}"] for name in ("ssm_in.weight", "ssm_x.weight", "ssm_out.weight")} == {"Q4_K"}
    assert types["blk.9.ssm_dt.weight"] == "Q5_0"  # rows of 160
    assert {types[f"blk.9.{name}"] for name in ("ssm_conv1d.weight", "ssm_a", "ssm_d")} == {"F32"}
    assert types["token_embd.weight"] == "Q6_K"
    small = {t.name: t.type.name for t in plan(SHAPES["mamba-130m"], "Q4_K_M")}
    assert small["blk.0.ssm_dt.weight"] == "F16"  # rows of 48


def test_small_matrices_of_rwkv_stay_as_they_are():
    types = {t.name: t.type.name for t in plan(SHAPES["rwkv7-2.9b"], "Q4_K_M")}
    found = [types[f"blk.9.time_mix_{name}.weight"] for name in ("w1", "w2", "a1", "g2", "key", "lerp_fused", "k_k")]
    assert found == ["F32", "F32", "F16", "F16", "Q4_K", "F32", "F32"]


def test_rows_of_896_fall_back_as_llama_cpp_does():
    types = {t.name: t.type.name for t in plan(SHAPES["qwen2-0.5b"], "Q4_K_M")}
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == "Q5_0"
    assert types["blk.0.attn_v.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "Q6_K"  # rows of 4864 are whole blocks


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_every_shape(name, recipe):
    assert {t.type for t in plan(SHAPES[name], recipe)} <= set(FORMATS)


@pytest.mark.parametrize("name", TINY)
def test_tiny_files_open_here_and_in_the_gguf_package(tmp_path, name):
    path = make(tmp_path / "a.gguf", name)
    theirs = gguf.GGUFReader(path)
    with open_gguf(path) as ours:
        assert [t.name for t in theirs.tensors] == list(ours.tensors)
        for tensor in theirs.tensors:
            np.testing.assert_array_equal(tensor.data.view(np.uint8), ours.raw(tensor.name))
        meta = ours.metadata
        arch = meta["general.architecture"]
        assert len(meta["tokenizer.ggml.tokens"]) == len(set(meta["tokenizer.ggml.tokens"])) == 1024
        assert len(meta["tokenizer.ggml.token_type"]) == 1024
        tokens = set(meta["tokenizer.ggml.tokens"])
        for merge in meta["tokenizer.ggml.merges"]:
            left, right = merge.split(" ")
            assert {left, right, left + right} <= tokens
        for info in ours.tensors.values():
            assert np.isfinite(dequantize(ours.raw(info.name), info.type)).all()
        names = set(ours.tensors)
        assert ("blk.0.attn_q.bias" in names) == (arch == "qwen2")
        assert ("blk.0.attn_k_norm.weight" in names) == (arch in ("qwen3", "qwen3moe"))
        assert ("blk.0.ffn_gate_exps.weight" in names) == (arch == "qwen3moe")
        assert ("rope_freqs.weight" in names) == (arch == "llama")
        assert ("blk.0.ssm_a" in names) == (arch in ("mamba", "mamba2", "qwen35", "granitehybrid"))
        assert ("blk.1.attn_k_norm.weight" in names) == arch.startswith(("qwen3", "lfm2"))
        if arch == "qwen3moe":
            assert ours.tensors["blk.0.ffn_down_exps.weight"].shape == (4, 256, 256)
            assert meta["qwen3moe.expert_used_count"] == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_have_the_planned_scale(tmp_path, recipe):
    path = make(tmp_path / "a.gguf", "tiny-qwen2", "--type", recipe)
    planned = {t.name: t for t in plan(SHAPES["tiny-qwen2"], recipe)}
    with open_gguf(path) as file:
        for name, info in file.tensors.items():
            x = dequantize(file.raw(name), info.type).astype(np.float64)
            noise = 1 + 4 / np.sqrt(x.size)
            assert x.std() == pytest.approx(planned[name].std, rel=0.1 * noise), name
            assert x.mean() == pytest.approx(planned[name].mean, abs=0.2 * noise * planned[name].std), name


def test_no_two_rows_of_the_head_are_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "POOL_BYTES", 64 << 10)  # far smaller than the tensor: blocks come again and again
    path = make(tmp_path / "a.gguf", "tiny-llama", "--type", "Q6_K")
    with open_gguf(path) as file:
        head = dequantize(file.raw("token_embd.weight"), GGMLType.Q6_K)
    logits = head @ np.random.default_rng(0).normal(size=head.shape[1]).astype(np.float32)
    assert len(np.unique(logits)) > 0.99 * len(head)  # a row is one block here: scales may agree by chance
    assert 1 < logits.std() < 5


def test_equal_arguments_give_equal_files(tmp_path):
    first = make(tmp_path / "a.gguf", "tiny-llama", "--seed", "3").read_bytes()
    assert make(tmp_path / "b.gguf", "tiny-llama", "--seed", "3").read_bytes() == first
    assert make(tmp_path / "c.gguf", "tiny-llama", "--seed", "4").read_bytes() != first


def test_overrides_and_layers(tmp_path):
    arguments = ["--type", "Q4_0", "--override", "attn_[qk]=Q8_0", "--override", r"blk\.1\.attn_q=F16", "--layers", "3"]
    with open_gguf(make(tmp_path / "a.gguf", "tiny-llama", *arguments)) as file:
        types = {name: info.type.name for name, info in file.tensors.items()}
        assert types["blk.0.attn_q.weight"] == types["blk.2.attn_k.weight"] == "Q8_0"
        assert types["blk.1.attn_q.weight"] == "F16"
        assert types["blk.0.attn_norm.weight"] == "F32"
        assert types["blk.2.ffn_up.weight"] == "Q4_0"
        assert file.metadata["llama.block_count"] == 3


def test_rope_factors_of_llama_3():
    factors = rope_factors(SHAPES["llama-3.1-8b"])
    assert factors.shape == (64,)
    assert factors[0] == 1
    assert factors[-1] == 8
    assert (np.diff(factors) >= 0).all()
    assert 1 < factors[32] < 8


def test_as_a_program(tmp_path):
    root, module = Path(synthetic.__file__).parents[1], "scripts.make_synthetic_gguf"
    run = subprocess.run([sys.executable, "-m", module, "--list"], capture_output=True, text=True, cwd=root, check=True)
    assert "llama-3.1-8b" in run.stdout
    bad = subprocess.run(
        [sys.executable, "-m", module, "tiny-llama", "--override", "attn_q=Q9"],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert bad.returncode == 2
    assert "REGEX=TYPE" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_a_large_tensor_is_written_whole(tmp_path):
    tensors = plan(SHAPES["tiny-llama"], "Q4_K_M")
    big = synthetic.replace(tensors[0], shape=(40_000, 1024), type=GGMLType.Q4_K)
    pool = synthetic.Pool(GGMLType.Q4_K, 0)
    with (tmp_path / "a.bin").open("wb") as out:
        pool.write(out, big, np.random.default_rng(0))
    assert (tmp_path / "a.bin").stat().st_size == big.n_bytes
