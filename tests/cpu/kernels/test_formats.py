"""Products and rows of every tensor type, straight from packed weights, against numpy in float64."""

import tracemalloc

import gguf
import numpy as np
import pytest

from engine.cpu.backend import CpuBackend
from engine.cpu.kernels.build import kernel
from engine.cpu.kernels.formats.decoders import DECODERS
from engine.cpu.products.matmul import DOT_TOKENS, matmul
from engine.cpu.steps.operands import embed_rows
from engine.cpu.threads import ThreadPool
from engine.gguf.quants import GGMLType, dequantize
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model
from engine.model.weights import Weight as StackedWeight
from tests.support import block_references
from tests.support.models.gguf_builder import random_blocks, tiny_llama
from tests.support.weights import Weight

every_type = pytest.mark.parametrize("ggml_type", list(GGMLType), ids=lambda t: t.name)


@pytest.fixture(scope="module")
def pool():
    with ThreadPool(2) as two:
        yield two


def random_weight(ggml_type, rows, columns, seed=0):
    raw = random_blocks((rows, columns), ggml_type, std=10.0, seed=seed)
    raw.flags.writeable = False
    return Weight(ggml_type, (rows, columns), raw)


def truth(w):
    """Weights in float64, by the gguf package where it has the type."""
    if w.type in block_references.TYPES:
        return block_references.decode(w.raw, w.type).astype(np.float64)
    return gguf.quants.dequantize(w.raw, gguf.GGMLQuantizationType(int(w.type))).reshape(w.shape).astype(np.float64)


def test_every_type_is_compiled():
    assert set(DECODERS) == {ggml_type.name for ggml_type in GGMLType}


@every_type
def test_products(ggml_type, pool):
    """One row, a few and many rows of x, that is all three ways to multiply; rows of blocks odd in number."""
    w = random_weight(ggml_type, 37, 3 * 256)
    weights = truth(w)
    for tokens in (1, 3, DOT_TOKENS + 1):
        x = np.random.default_rng(tokens).standard_normal((tokens, 768), dtype=np.float32)
        exact = x.astype(np.float64) @ weights.T
        # A float32 sum in 16 lanes: half a unit of the sum of magnitudes a step, and one for the weight itself.
        bound = (768 / 16 + 8) * 2.0**-24 * (np.abs(x.astype(np.float64)) @ np.abs(weights).T)
        got = matmul(x, w, pool=pool)
        assert (np.abs(got - exact) <= bound + 1e-30).all()
        assert (np.abs(matmul(x, w, pool=pool, reference=True) - exact) <= bound + 1e-30).all()
        assert np.array_equal(got[-1:], matmul(x[-1:], w, pool=pool))  # whatever rows are beside it


@every_type
def test_weights_are_those_of_numpy(ggml_type):
    """The compiled decoder gives the very bits, for any bytes but scales that are no numbers."""
    columns = 4 * 256
    raw = np.random.default_rng(1).integers(
        0, 256, (64, columns // ggml_type.block_size * ggml_type.type_size), np.uint8
    )
    decoder = DECODERS[ggml_type.name]
    want, got = dequantize(raw, ggml_type), np.empty((64, columns), np.float32)
    unpack = kernel("dequantize_rows", ggml_type.name)
    unpack(raw.ctypes.data, raw.strides[0], columns // decoder.block_size, got.ctypes.data, got.strides[0], 64)
    finite = np.isfinite(want)
    assert finite.any()
    assert np.array_equal(np.isfinite(got), finite)
    # Formats with a minimum are rounded once here (a fused multiplication), twice in numpy.
    fused = ggml_type.name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
    if fused:
        np.testing.assert_allclose(got[finite], want[finite], rtol=1e-4, atol=1e-3)
    else:
        assert np.array_equal(got[finite].view(np.uint32), want[finite].view(np.uint32))


@every_type
def test_embedding_rows(ggml_type):
    table = random_weight(ggml_type, 23, 512)
    ids = np.array([22, 0, 7, 7], np.int32)
    out = np.empty((4, 512), np.float32)
    embed_rows(table, ids, out)
    np.testing.assert_allclose(out, truth(table)[ids], rtol=1e-6, atol=1e-6)


@every_type
def test_no_copy_of_the_matrix_in_memory(ggml_type, pool):
    w = random_weight(ggml_type, 2048, 1024)
    x = np.ones((1, 1024), np.float32)
    matmul(x, w, pool=pool)
    tracemalloc.start()
    matmul(x, w, pool=pool)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 10  # of 8 MB as float32


@every_type
def test_stacks_of_experts(ggml_type, pool):
    """A 3-D tensor, matrix by matrix, and rows cut out of every matrix."""
    raw = random_blocks((3, 10, 256), ggml_type, std=10.0)
    stack = StackedWeight("blk.0.ffn_up_exps.weight", ggml_type, (3, 10, 256), raw)
    x = np.random.default_rng(5).standard_normal((2, 256), dtype=np.float32)
    cut = stack.slice_rows(4, 9)
    for index in range(3):
        whole = matmul(x, stack.expert(index), pool=pool)
        matrix = Weight(ggml_type, (10, 256), raw[index])
        np.testing.assert_allclose(whole, x @ truth(matrix).T, rtol=1e-4, atol=2e-2)
        assert np.array_equal(matmul(x, cut.expert(index), pool=pool), whole[:, 4:9])


@pytest.mark.parametrize("name", ["F64", "I8", "I16", "I32", "I64"])
@pytest.mark.parametrize("columns", [1, 7, 33])
def test_plain_numbers_in_rows_of_any_length(name, columns, pool):
    w = random_weight(GGMLType[name], 5, columns)
    x = np.random.default_rng(columns).standard_normal((2, columns), dtype=np.float32)
    np.testing.assert_allclose(matmul(x, w, pool=pool), x @ truth(w).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ggml_type", [t for t in GGMLType if t.block_size > 1], ids=lambda t: t.name)
def test_a_model_of_every_quantized_type(tmp_path, ggml_type):
    """A prompt and a decode step of a whole model, compiled and in plain numpy."""
    path, logits = tmp_path / "tiny.gguf", []
    tiny_llama(path, width=256, ffn=256, n_layers=1, weight_type=ggml_type, tokenizer=False)
    with open_gguf(path) as file:
        model = load_model(file)
        assert model.weights.layers[0].attention.q.weight.type is ggml_type
        for reference in (True, False):
            backend = CpuBackend(model, kv_type="f32", context_length=64, threads=1, reference=reference)
            steps = [(0, list(range(30)), 0, Outputs.LAST)], [(0, [7], 30, Outputs.LAST)]
            logits.append([backend.forward(Batch.build(step)) for step in steps])
            backend.close()
        del model, backend
    for plain, fast in zip(*logits, strict=True):
        np.testing.assert_allclose(fast, plain, atol=1e-4 * np.abs(plain).max())
