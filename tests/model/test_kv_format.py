"""Rows of an 8-bit cache against the gguf package's Q8_0, and the models that cannot have one."""

from dataclasses import replace

import gguf.quants
import numpy as np
import pytest

from engine.config import KV_BLOCK, KvType
from engine.errors import InvalidRequestError
from engine.gguf.reader import open_gguf
from engine.model.kv_format import check_kv_type, dequantize, quantize
from engine.model.loader import load_model
from tests.support.models.compressed_models import compressed
from tests.support.models.feature_models import latent
from tests.support.models.gguf_builder import tiny_llama


def edges():
    """Rows whose quants are halves, and the largest and smallest scales that are numbers."""
    rng = np.random.default_rng(1)
    halves = (rng.integers(-127, 127, (4, 64)) + 0.5).astype(np.float32)
    halves[:, ::32] = 127
    below = np.full((1, 64), np.nextafter(np.float32(0.5), np.float32(0)), np.float32)
    below[:, ::32] = -127
    sized = rng.uniform(-1, 1, (5, 64)).astype(np.float32)
    sized[:, ::32] = 1
    sized *= np.array([8.3e6, 1, 1e-3, 3.9e-6, 0], np.float32)[:, None]
    return np.concatenate([halves, below, sized])


@pytest.mark.parametrize("x", [np.random.default_rng(0).normal(size=(500, 128)).astype(np.float32), edges()])
def test_rows_are_blocks_of_q8_0(x):
    q, scales = quantize(x)
    assert q.dtype == np.int8
    assert scales.shape == (len(x), x.shape[1] // KV_BLOCK)
    blocks = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0).reshape(len(x), -1, 2 + KV_BLOCK)
    np.testing.assert_array_equal(scales[..., None].view(np.uint8), blocks[..., :2])
    np.testing.assert_array_equal(q.reshape(len(x), -1, KV_BLOCK).view(np.uint8), blocks[..., 2:])
    read = dequantize(q, scales)
    np.testing.assert_array_equal(read, gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0).reshape(x.shape))
    assert KvType.Q8_0.row_bytes(x.shape[1]) == q[0].nbytes + scales[0].nbytes == blocks[0].nbytes


def test_blocks_that_hold_no_numbers():
    x = np.ones((4, 64), np.float32)
    x[0, 3], x[1, 40], x[2, 5], x[3, 63] = np.nan, -np.inf, 9e6, 1e-7
    q, scales = quantize(x)
    assert not q[0, :32].any()
    read = dequantize(q, scales)
    np.testing.assert_array_equal(np.isnan(read).reshape(4, 2, 32).all(axis=-1), [[1, 0], [0, 1], [1, 0], [0, 0]])
    np.testing.assert_array_equal(read[np.isfinite(read)].round(), np.where(x == 1, 1, 0)[np.isfinite(read)])
    tiny, none = quantize(np.full((1, 32), 3e-6, np.float32))
    assert not tiny.any()
    assert not none.any()


def test_who_cannot_have_it(tmp_path):
    def config(content):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        with open_gguf(path) as file:
            return load_model(file).config

    narrow, wide = (config(tiny_llama(width=width)) for width in (64, 128))
    for kv_type in KvType:
        check_kv_type(wide, kv_type)
    check_kv_type(narrow, KvType.F16)
    with pytest.raises(InvalidRequestError, match=r"'q8_0'.*layer 0 has keys of 16 numbers.*multiples of 32: use"):
        check_kv_type(narrow, KvType.Q8_0)
    check_kv_type(replace(narrow, generates=False), KvType.Q8_0)
    for file in (latent(True)[0], compressed()):
        with open_gguf(file.write(tmp_path)) as gguf_file:
            model = load_model(gguf_file).config
        with pytest.raises(InvalidRequestError, match=r"latent vectors.*stay float"):
            check_kv_type(model, KvType.Q8_0)
