"""Tensors of more than 2^31 elements, in files that are mostly holes: every index has to have 64 bits.

Only the last rows are written and read, so a test takes no more disk or time than they do.
"""

import os

import numpy as np
import pytest

from engine.cpu.kernels.build import kernel
from engine.cpu.products.integer import IntegerWeights, dot_kind, empty_activations, n_items, quantize_operands
from engine.cpu.products.matmul import NOTHING, dot_operands, matmul, prepare
from engine.cpu.steps.operands import embed_rows
from engine.cpu.threads import ThreadPool
from engine.gguf import GGMLType, dequantize, open_gguf
from engine.gguf.types import row_bytes
from engine.model.weights import Weight
from tests.support.models.gguf_builder import build_gguf, random_blocks

COLUMNS = 256
ROWS = 2**31 // COLUMNS + 5  # 2^31 + 1280 elements; 4.3 GB as F16
WRITTEN = 4

large_types = pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K", "IQ2_S", "Q1_0"])


def sparse_file(path, ggml_type, shape):
    """A file of one tensor whose last WRITTEN rows are random blocks, all before them zeros that take no space."""
    end = random_blocks((WRITTEN, shape[-1]), ggml_type, std=1.0)
    n_bytes = int(np.prod(shape[:-1])) * row_bytes(ggml_type, shape[-1])
    # The directory comes from a file that holds nothing but it, the tensor's data from nowhere.
    head = build_gguf({"general.architecture": "llama"}, {"w": (np.empty(0, np.uint8), shape, ggml_type)})
    with open(path, "wb") as file:
        file.write(head)
        file.seek(len(head) + n_bytes - end.size)
        file.write(end.tobytes())
    if os.stat(path).st_blocks * 512 > 1 << 24:
        pytest.skip("this file system has no sparse files")
    return end


@large_types
def test_last_rows_of_a_large_matrix(tmp_path, name):
    ggml_type, path = GGMLType[name], tmp_path / "large.gguf"
    end = sparse_file(path, ggml_type, (ROWS, COLUMNS))
    values = dequantize(end, ggml_type)
    x = np.random.default_rng(0).standard_normal((1, COLUMNS), dtype=np.float32)
    expected = x.astype(np.float64) @ values.T.astype(np.float64)
    with open_gguf(path) as gguf, ThreadPool(1) as pool:
        table = Weight("w", ggml_type, (ROWS, COLUMNS), gguf.raw("w"))
        assert np.array_equal(table.raw[-WRITTEN:], end)

        found = np.empty((2, COLUMNS), np.float32)
        embed_rows(table, np.array([ROWS - 1, ROWS - WRITTEN], np.int32), found)
        np.testing.assert_allclose(found, values[[-1, 0]], rtol=1e-6, atol=1e-6)

        last = table.slice_rows(ROWS - WRITTEN, ROWS)
        np.testing.assert_allclose(matmul(x, last, pool=pool), expected, rtol=1e-5, atol=1e-4)
        # The same rows as a task of the whole product: the kernel finds them by their number.
        out = np.zeros((1, ROWS), np.float32)
        operands = np.array(dot_operands(x, prepare(table), out, NOTHING), np.int64)
        kernel("dot_rows", name)(operands.ctypes.data, ROWS - WRITTEN, ROWS, 0)
        np.testing.assert_allclose(out[:, -WRITTEN:], expected, rtol=1e-5, atol=1e-4)
        del table, last


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_last_rows_in_integers(tmp_path, name):
    """The same where activations are rounded to 8 bits: by their numbers in the whole matrix, and as a small one."""
    ggml_type, path = GGMLType[name], tmp_path / "large.gguf"
    sparse_file(path, ggml_type, (ROWS, COLUMNS))
    x = np.random.default_rng(0).standard_normal((2, COLUMNS), dtype=np.float32)
    with open_gguf(path) as gguf, ThreadPool(1) as pool:
        table, weights = Weight("w", ggml_type, (ROWS, COLUMNS), gguf.raw("w")), IntegerWeights(pool, 8)

        def product(weight, n_tokens, last_items):
            kind, prepared = dot_kind(n_tokens), prepare(weight)
            form = weights.form(prepared, n_tokens)
            quantized = empty_activations(*x.shape, form)
            operands = np.array(quantize_operands(x, quantized, form), np.int64)
            kernel("quantize")(operands.ctypes.data, 0, quantized.shape[0] * quantized.shape[1], 0)
            out = np.zeros((n_tokens, prepared.rows), np.float32)
            operands = np.array(weights.operands(quantized[:n_tokens], prepared, out), np.int64)
            count = n_items(kind, prepared)
            kernel(kind, weights.kernel_type(prepared))(operands.ctypes.data, count - last_items, count, 0)
            return out[:, -WRITTEN:]

        for n_tokens in (1, 2):
            found = product(table, n_tokens, 2)
            assert np.abs(found).max() > 1
            np.testing.assert_array_equal(found, product(table.slice_rows(ROWS - WRITTEN, ROWS), n_tokens, 1))
        del table


@large_types
def test_last_expert_of_a_large_stack(tmp_path, name):
    ggml_type, path = GGMLType[name], tmp_path / "experts.gguf"
    shape = (64, ROWS // 32, COLUMNS)  # 2^32 elements
    end = sparse_file(path, ggml_type, shape)
    x = np.random.default_rng(0).standard_normal((3, COLUMNS), dtype=np.float32)
    with open_gguf(path) as gguf, ThreadPool(1) as pool:
        stack = Weight("w", ggml_type, shape, gguf.raw("w"))
        last = stack.slice_rows(shape[1] - WRITTEN, shape[1]).expert(63)
        expected = x.astype(np.float64) @ dequantize(end, ggml_type).T.astype(np.float64)
        np.testing.assert_allclose(matmul(x, last, pool=pool), expected, rtol=1e-5, atol=1e-4)
        del stack, last
