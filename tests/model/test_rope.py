"""Rotation frequencies worked out by hand, and rotation itself on a few numbers."""

import math

import numpy as np
import pytest

from engine.cpu import reference
from engine.errors import ModelFileError
from engine.gguf.reader import open_gguf
from engine.model.config import AttentionTemperature, RopeConfig, RopeScaling, RopeStyle
from engine.model.loader import load_model
from engine.model.rope import build_rope, yarn_magnitude
from tests.support.models.gguf_builder import build_gguf, tiny_llama_parts


def config(**options):
    return RopeConfig(**({"style": RopeStyle.NORM, "n_rot": 8, "base": 10000.0} | options))


def yarn(**options):
    return config(**({"scaling": RopeScaling.YARN, "factor": 4.0, "original_context": 1024} | options))


def test_frequencies():
    table = build_rope(config())
    np.testing.assert_allclose(table.inv_freq, [1.0, 0.1, 0.01, 0.001])
    assert table.magnitude == 1.0


def test_linear_scaling():
    table = build_rope(config(scaling=RopeScaling.LINEAR, factor=4.0))
    np.testing.assert_allclose(table.inv_freq, [0.25, 0.025, 0.0025, 0.00025])


def test_factors_divide():
    table = build_rope(config(), np.array([1, 2, 4, 8], np.float32))
    np.testing.assert_allclose(table.inv_freq, [1.0, 0.05, 0.0025, 0.000125])


def test_yarn_by_hand():
    # Pairs turning 32 times and once in 1024 positions: 8 ln(1024 / 64π) / (2 ln 10000) = 0.71 and 2.21, so the blend
    # runs from pair 0 (kept) to pair 3 (interpolated): 1, 2/3, 1/3, 0.
    table = build_rope(yarn())
    np.testing.assert_allclose(table.inv_freq, [1.0, 0.1 * 0.75, 0.01 * 0.5, 0.001 * 0.25])
    assert table.magnitude == pytest.approx(1.0 + 0.1 * math.log(4.0))


@pytest.mark.parametrize(
    ("options", "magnitude"),
    [
        ({"factor": 1.0}, 1.0),
        ({"attention_factor": 0.5}, 0.5 * (1.0 + 0.1 * math.log(4.0))),
        ({"extrapolation": 0.0}, 1.0),
        ({"log_multiplier": 1.0}, 1.0),
        ({"log_multiplier": 0.5}, (1.0 + 0.1 * math.log(4.0)) / (1.0 + 0.05 * math.log(4.0))),
    ],
)
def test_yarn_magnitude(options, magnitude):
    assert yarn_magnitude(yarn(**options)) == pytest.approx(magnitude)


def test_yarn_without_extrapolation_is_linear():
    np.testing.assert_allclose(build_rope(yarn(extrapolation=0.0)).inv_freq, [0.25, 0.025, 0.0025, 0.00025])


@pytest.mark.parametrize("style", RopeStyle)
@pytest.mark.parametrize("n_rot", [8, 4])
def test_rotation(style, n_rot):
    table = build_rope(config(style=style, n_rot=n_rot))
    positions = np.array([0, 1, 7, 100_000], np.int32)
    x = np.random.default_rng(0).normal(size=(4, 3, 8)).astype(np.float32)
    turned = x.copy()
    reference.rotate(turned, *table.cos_sin(positions), style)
    np.testing.assert_array_equal(turned[0], x[0])
    np.testing.assert_array_equal(turned[..., n_rot:], x[..., n_rot:])
    for t, position in enumerate(positions):
        for i in range(n_rot // 2):
            a, b = (2 * i, 2 * i + 1) if style is RopeStyle.NORM else (i, i + n_rot // 2)
            number = (x[t, :, a] + 1j * x[t, :, b]) * np.exp(1j * float(position) * 10000.0 ** (-2.0 * i / n_rot))
            np.testing.assert_allclose(turned[t, :, a], number.real, atol=1e-6)
            np.testing.assert_allclose(turned[t, :, b], number.imag, atol=1e-6)


def test_temperature():
    factors = reference.temperature_factors(np.array([0, 9, 10, 35], np.int32), AttentionTemperature(0.1, 10))
    np.testing.assert_allclose(factors, [1, 1, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(4)], rtol=1e-6)


def test_widening_of_every_half():
    half = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = np.isfinite(half)
    expected = half[finite].astype(np.float32)
    np.testing.assert_array_equal(reference.widen(half)[finite].view(np.uint32), expected.view(np.uint32))
    assert reference.widen(np.array([np.inf, -np.inf], np.float16)).tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("pattern", [[True, False], [False, True], [True]])
def test_a_list_says_which_layers_rotate(tmp_path, pattern):
    meta, tensors = tiny_llama_parts(tokenizer=False, architecture="granite_swa")
    heads = meta["granite_swa.attention.head_count"]
    tensors |= {f"blk.{layer}.attn_sinks.weight": np.zeros(heads, np.float32) for layer in range(2)}
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build_gguf(meta | {"granite_swa.attention.rope_pattern": pattern}, tensors))
    with open_gguf(path) as file:
        if len(pattern) < 2:
            with pytest.raises(ModelFileError, match=r"rope_pattern holds 1 values; allowed are 2"):
                load_model(file)
        else:
            layers = load_model(file).config.layers
            assert [layer.attention.rope is not None for layer in layers] == pattern
