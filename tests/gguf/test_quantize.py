"""Quantizers: how much they lose, that nothing representable is lost, and files rewritten with them."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.api.llm import LLM
from engine.errors import GGUFError
from engine.gguf import GGMLType, dequantize, open_gguf
from engine.gguf.quantizers.fitting import best_line, best_scale, ternary, whole_numbers
from engine.gguf.quantizers.quantize import WRITABLE, quantize
from engine.gguf.quantizers.rewrite import matrices, rewrite
from tests.support.models.gguf_builder import tiny_llama

# Largest relative error (root mean square) on normally distributed weights; about 5 percent above what was measured.
LOSS = {
    "F32": 0, "F64": 0, "F16": 3e-4, "BF16": 2e-3, "Q8_0": 6e-3, "Q8_1": 6e-3, "Q8_K": 8e-3,
    "Q4_0": 0.087, "Q4_1": 0.075, "Q5_0": 0.043, "Q5_1": 0.036,
    "Q1_0": 0.63, "Q2_0": 0.37, "TQ1_0": 0.46, "TQ2_0": 0.46,
    "Q2_K": 0.29, "Q3_K": 0.155, "Q4_K": 0.077, "Q5_K": 0.039, "Q6_K": 0.019,
    "IQ1_S": 0.48, "IQ1_M": 0.45, "IQ2_XXS": 0.36, "IQ2_XS": 0.32, "IQ2_S": 0.27, "IQ3_XXS": 0.2, "IQ3_S": 0.145,
    "IQ4_NL": 0.08, "IQ4_XS": 0.081, "MXFP4": 0.12, "NVFP4": 0.091,
}  # fmt: skip

writable = pytest.mark.parametrize("kind", WRITABLE, ids=lambda kind: kind.name)


def loss(x, packed, kind):
    difference = dequantize(packed, kind) - x
    return float(np.sqrt((difference**2).mean() / (x**2).mean()))


def test_all_but_whole_numbers_can_be_written():
    assert set(GGMLType) - set(WRITABLE) == {GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64}
    assert set(LOSS) == {kind.name for kind in WRITABLE}


@writable
def test_loss_on_normal_weights(kind):
    x = np.random.default_rng(0).normal(0, 0.05, (64, 1024)).astype(np.float32)
    packed = quantize(x, kind)
    assert packed.dtype == np.uint8
    assert packed.shape == (64, 1024 // kind.block_size * kind.type_size)
    assert loss(x, packed, kind) <= LOSS[kind.name]


@pytest.mark.parametrize("name", ["BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_loss_against_the_gguf_package(name):
    """Never more than plain rounding; the same bytes where there is nothing to choose."""
    x = np.random.default_rng(1).standard_t(4, (64, 1024)).astype(np.float32)
    other = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
    ours = quantize(x, GGMLType[name])
    assert loss(x, ours, GGMLType[name]) <= loss(x, other, GGMLType[name]) * (1 + 1e-6)
    if name == "BF16":
        assert np.array_equal(ours, other)


@writable
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_difficult_blocks(kind, scale):
    """Zeros stay zeros, one outlier or equal weights do not spoil the rest, and nothing becomes infinite."""
    x = np.zeros((6, 512), np.float32)
    x[1, 100] = scale
    x[2] = scale
    x[3] = -scale
    x[4, ::2] = scale
    x[5] = np.linspace(-scale, scale, 512)
    y = dequantize(quantize(x, kind), kind)
    assert np.isfinite(y).all()
    assert not y[0].any() or kind is GGMLType.Q1_0
    assert np.abs(y - x).max() <= 1.5 * scale
    # E4M3 scales reach from 2^-9 to 448 only.
    if kind is not GGMLType.NVFP4 or scale == 1:
        wide = kind.name in ("IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0")
        assert loss(x[5], quantize(x[5], kind), kind) < (0.75 if wide else 0.45)


@pytest.mark.parametrize("kind", [k for k in WRITABLE if k.name in ("Q4_0", "Q5_0", "Q8_0", "TQ1_0", "TQ2_0", "Q1_0")])
def test_what_can_be_represented_is_kept(kind):
    rng = np.random.default_rng(2)
    reach = {"Q4_0": (-8, 8), "Q5_0": (-16, 16), "Q8_0": (-127, 128), "Q1_0": (0, 2)}.get(kind.name, (-1, 2))
    q = rng.integers(*reach, (32, 256))
    q[:, ::32] = reach[0] if kind.name != "Q1_0" else 1
    x = ((2 * q - 1) if kind.name == "Q1_0" else q).astype(np.float32) * np.float32(0.125)
    np.testing.assert_array_equal(dequantize(quantize(x, kind), kind), x)


def test_ternary_is_the_best_of_all():
    x = np.random.default_rng(3).standard_normal((50, 8)).astype(np.float32)
    d, t = ternary(x)
    choices = np.stack(np.meshgrid(*[[-1, 0, 1]] * 8), -1).reshape(-1, 8)[1:].astype(np.float32)
    choices = choices[np.abs(choices).sum(axis=1) > 0]
    fits = (x @ choices.T) ** 2 / (choices**2).sum(axis=1)
    least = (x**2).sum(axis=1) - fits.max(axis=1)
    np.testing.assert_allclose(((d[:, None] * t - x) ** 2).sum(axis=1), least, rtol=1e-4, atol=1e-5)


def test_scales_do_not_lose_to_a_fine_search():
    x = np.random.default_rng(4).standard_normal((20, 32)).astype(np.float32)
    rounded = whole_numbers(-8, 7)
    d = best_scale(x, [-8 + 0.1 * step for step in range(-9, 10)], rounded)[:, None]
    found = ((d * rounded(x / d) - x) ** 2).sum(axis=1)
    tried = np.linspace(0.05, 0.8, 3000, dtype=np.float32)
    scales = np.concatenate([tried, -tried])[:, None, None]
    least = ((scales * rounded(x / scales) - x) ** 2).sum(axis=2).min(axis=0)
    assert (found <= 1.1 * least).all()
    scale, offset = best_line(x, 15, lowest_is_negative=True)
    assert (offset <= 0).all()
    line = scale[:, None] * np.clip(np.rint((x - offset[:, None]) / scale[:, None]), 0, 15) + offset[:, None]
    assert (((line - x) ** 2).sum(axis=1) < least).mean() > 0.5


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="I32: cannot be written; allowed: F32, F16, Q4_0"):
        quantize(np.zeros(4), GGMLType.I32)
    with pytest.raises(ValueError, match=r"Q6_K: found shape \(2, 100\); allowed: rows of a multiple of 256"):
        quantize(np.zeros((2, 100)), GGMLType.Q6_K)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_llama(path, width=256, ffn=256)
    return path


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XS", "Q2_0", "F32"])
def test_rewritten_files(tiny, tmp_path, name):
    target, kind = tmp_path / "new.gguf", GGMLType[name]
    with open_gguf(tiny) as source:
        rewrite(source, target, {info.name: kind for info in matrices(source)})
        with open_gguf(target) as new:
            assert list(new.tensors) == list(source.tensors)
            assert {k: str(v) for k, v in new.metadata.items() if k != "general.file_type"} == {
                k: str(v) for k, v in source.metadata.items() if k != "general.file_type"
            }
            for tensor, info in new.tensors.items():
                was = source.tensors[tensor]
                assert info.shape == was.shape
                if len(info.shape) == 1:
                    assert info.type is was.type
                    assert np.array_equal(new.raw(tensor), source.raw(tensor))
                else:
                    assert info.type is kind
                    assert np.array_equal(new.raw(tensor), quantize(dequantize(source.raw(tensor), was.type), kind))
    if name != "Q2_0":  # a number that the package does not know
        assert len(gguf.GGUFReader(target).tensors) == len(new.tensors)
    with LLM(target, device="cpu") as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()


def test_nothing_is_left_of_a_failed_file(tiny, tmp_path):
    target = tmp_path / "new.gguf"
    with open_gguf(tiny) as source:
        with pytest.raises(GGUFError, match="'nothing': not found"):
            rewrite(source, target, {"nothing": GGMLType.Q8_0})
        with pytest.raises(GGUFError, match="I8 cannot be written; allowed: F32"):
            rewrite(source, target, {"token_embd.weight": GGMLType.I8})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]


def test_requantize_script(tiny, tmp_path):
    root, module = Path(__file__).parents[2], "scripts.requantize"
    target = tmp_path / "new.gguf"
    arguments = [str(tiny), str(target), "--type", "q5_k", "--override", "ffn_(up|gate)=IQ4_NL"]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "15 tensors packed" in done.stdout
    with open_gguf(target) as new:
        assert new.tensors["blk.1.ffn_up.weight"].type is GGMLType.IQ4_NL
        assert new.tensors["blk.1.attn_q.weight"].type is GGMLType.Q5_K
        assert new.metadata["general.file_type"] == 16
    done = subprocess.run(
        [sys.executable, "-m", module, "x", "y", "--type", "I8"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "'I8' cannot be written; allowed: F32" in done.stderr
