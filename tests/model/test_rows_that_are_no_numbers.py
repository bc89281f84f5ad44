"""A token whose embedding is NaN spoils its own row and those that see it: no row before it, no later request."""

from functools import partial

import numpy as np
import pytest

from engine.cpu.backend import CpuBackend
from engine.cpu.reference import attend, widen
from engine.gguf.reader import open_gguf
from engine.gguf.types import GGMLType
from engine.model.batch import Batch, Outputs
from engine.model.config import AttentionConfig
from engine.model.loader import load_model
from tests.support.models.feature_models import CASES, LATENT_CASES, latent
from tests.support.models.gguf_builder import build_gguf, pack, tiny_llama_parts
from tests.support.models.recurrent_models import tiny_mamba_parts

TOKEN, AT = 1, 20
"""The token without an embedding, and its place in prompts."""

GROUPED = {"sinks_and_clamped_gates", "latent(True, True)", "latent(True, False)", "latent(False, True)"}
GROUPED |= {"latent(False, False)"}
"""Models with experts: the reference multiplies the rows of an expert together, by BLAS, whose last bits depend on how
many there are."""

FEATURES = [pytest.param(case, id=case.__name__) for case in CASES]
FEATURES += [pytest.param(partial(latent, *case), id=f"latent{case}") for case in LATENT_CASES]


def without_embedding(tensors):
    """The same tensors; TOKEN's embedding is NaN, and the head, if it was the embedding, is what that was."""
    table = tensors["token_embd.weight"]
    spoilt = table.copy()
    spoilt[TOKEN] = np.nan
    return {"output.weight": table} | tensors | {"token_embd.weight": spoilt}


def check(path, n_tokens, at, *, bits=True, **options):
    """Rows before, and the same slot with another prompt afterwards."""
    tokens = np.random.default_rng(0).integers(TOKEN + 1, 40, n_tokens).tolist()
    spoilt = [*tokens[:at], TOKEN, *tokens[at + 1 :]]
    with open_gguf(path) as gguf, np.errstate(invalid="ignore", over="ignore"):
        backend = CpuBackend(load_model(gguf), threads=1, **options)
        clean = backend.forward(Batch.build([(0, tokens, 0, Outputs.ALL)]))
        found = backend.forward(Batch.build([(0, spoilt, 0, Outputs.ALL)]))
        again = backend.forward(Batch.build([(0, tokens, 0, Outputs.ALL)]))
        backend.close()
        del backend
    assert np.isfinite(clean).all()
    assert np.isnan(found[at:]).all()
    assert again.tobytes() == clean.tobytes()
    if bits:
        assert found[:at].tobytes() == clean[:at].tobytes()
    else:
        np.testing.assert_allclose(found[:at], clean[:at], atol=1e-4)


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "kernels"])
@pytest.mark.parametrize("case", FEATURES)
def test_rows_before_it_stay(tmp_path, request, case, reference, kv_type):
    file, _ = case()
    file.tensors = without_embedding(file.tensors)
    grouped = any(name in request.node.name for name in GROUPED)
    check(file.write(tmp_path), 30, AT, bits=not (reference and grouped), reference=reference, kv_type=kv_type)


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "kernels"])
@pytest.mark.parametrize("kind", ["llama", "quantized", "mamba", "8-bit cache"])
def test_rows_before_it_stay_in_long_prompts(tmp_path, kind, reference):
    """Two pages of the cache; the second begins before the token."""
    if kind == "mamba":
        meta, tensors = tiny_mamba_parts()
    else:
        width = 128 if kind == "8-bit cache" else 64
        meta, tensors = tiny_llama_parts(weight_type=GGMLType.F32, width=width)
    if kind == "quantized":
        quantized = {name: one for name, one in tensors.items() if name.startswith("blk") and one.ndim == 2}
        tensors |= {name: pack(one, GGMLType.Q8_0) for name, one in quantized.items()}
    path = tmp_path / "model.gguf"
    path.write_bytes(build_gguf(meta, without_embedding(tensors)))
    check(path, 100, 70, reference=reference, kv_type="q8_0" if kind == "8-bit cache" else "f16")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_values_that_are_no_numbers_reach_the_rows_that_see_them(dtype):
    """Infinite values come of finite activations too, in a float16 cache."""
    rng = np.random.default_rng(3)
    q = rng.normal(size=(9, 4, 16)).astype(np.float32)
    keys, values = (rng.normal(size=(2, 9, 16)).astype(dtype) for _ in range(2))
    config = AttentionConfig(n_heads=4, n_kv_heads=2, key_width=16, value_width=16, scale=0.25, window=3, rope=None)
    clean = attend(q, keys, values, config, 0).reshape(9, 4, 16)
    for number in (np.inf, -np.inf, np.nan):
        values[1, 4, 5] = number
        found = attend(q, keys, values, config, 0).reshape(9, 4, 16)
        sees = np.zeros(found.shape, bool)
        sees[4:7, 2:, 5] = True
        np.testing.assert_array_equal(found[sees], np.full(6, number, np.float32))
        np.testing.assert_allclose(found[~sees], clean[~sees], rtol=1e-5, atol=1e-6)


def test_every_float16_is_widened():
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(widen(half), half.astype(np.float32))
