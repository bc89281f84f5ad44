"""What the loader refuses, and that its errors name the key or tensor, what was found and what is allowed."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import ModelFileError, UnsupportedModelError
from engine.gguf.reader import open_gguf
from engine.gguf.types import GGMLType
from engine.model.config import MoeConfig, RopeScaling, RopeStyle
from engine.model.loader import load_model
from tests.support.models.gguf_builder import build_gguf, tiny_llama, tiny_llama_parts


def load(path, metadata, tensors):
    path.write_bytes(build_gguf(metadata, tensors))
    with open_gguf(path) as gguf:
        return load_model(gguf)


def load_with(path, *, drop=(), add=None, architecture="llama", **metadata):
    """Load the tiny model with some metadata changed (None = removed) and some tensors dropped or added."""
    meta, tensors = tiny_llama_parts(tokenizer=False, architecture=architecture)
    for key, value in metadata.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        meta.pop(name, None)
        if value is not None:
            meta[name] = value
    for name in drop:
        del tensors[name]
    return load(path, meta, tensors | (add or {}))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.gguf"


def test_a_loaded_model(path):
    model = load_with(path)
    config = model.config
    assert (config.architecture, config.name, config.n_layers, config.width) == ("llama", "tiny", 2, 64)
    assert (config.vocab_size, config.context_length) == (272, 128)
    attention = config.layers[1].attention
    assert (attention.n_heads, attention.n_kv_heads, attention.key_width, attention.group) == (4, 2, 16, 2)
    assert attention.scale == 0.25
    assert attention.window is None
    assert attention.rope.style is RopeStyle.NORM
    assert attention.rope.scaling is RopeScaling.NONE
    assert model.weights.tied
    assert model.weights.output.weight is model.weights.token_embd
    assert model.weights.layers[0].attention.k.weight.shape == (32, 64)
    assert model.weights.layers[0].attention.rope is model.weights.layers[1].attention.rope


def test_weights_are_views(path):
    meta, tensors = tiny_llama_parts(tokenizer=False, weight_type=GGMLType.Q8_0)
    weight = load(path, meta, tensors).weights.layers[0].attention.q.weight
    assert weight.type is GGMLType.Q8_0
    assert not weight.raw.flags.owndata
    assert not weight.raw.flags.writeable
    assert weight.raw.shape == (64, 68)
    part = weight.slice_rows(8, 16)
    assert np.shares_memory(part.raw, weight.raw)
    assert (part.rows, part.columns, part.n_bytes) == (8, 64, 8 * 68)


def test_unknown_architecture(path):
    with pytest.raises(UnsupportedModelError, match=r"'gpt-9'.*llama, .*mistral3, .*qwen3"):
        load_with(path, architecture="gpt-9")


@pytest.mark.parametrize("kind", ["adapter", "mmproj"])
def test_a_part_of_a_model_is_no_model(path, kind):
    with pytest.raises(UnsupportedModelError, match=f"general.type is '{kind}'"):
        load(path, {"general.architecture": "llama", "general.type": kind}, {"x": np.zeros(4, np.float32)})


@pytest.mark.parametrize("value", [None, 7])
def test_no_architecture(path, value):
    meta, tensors = tiny_llama_parts(tokenizer=False)
    del meta["general.architecture"]
    if value is not None:
        meta["general.architecture"] = value
    with pytest.raises(ModelFileError, match=r"general\.architecture"):
        load(path, meta, tensors)


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.1.attn_k.weight", "blk.0.ffn_norm.weight", "output_norm.weight"]
)
def test_missing_tensor(path, name):
    with pytest.raises(UnsupportedModelError, match=f"tensor {name} is missing"):
        load_with(path, drop=[name])


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_q_norm.weight", "blk.2.attn_q.weight", "blk.0.attn_norm.bias", "output.junk", "rope_freqs.bias"],
)
def test_useless_tensor(path, name):
    with pytest.raises(UnsupportedModelError, match=f"no use for these tensors: {name}"):
        load_with(path, add={name: np.zeros(16, np.float32)})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.1.attn_k.weight", (64, 64)),
        ("blk.1.attn_q.bias", (63,)),
        ("blk.0.ffn_down.weight", (96, 64)),
        ("blk.0.ffn_gate.scale", (2,)),
        ("output.weight", (271, 64)),
        ("output_norm.weight", (64, 2)),
        ("rope_freqs.weight", (16,)),
        ("token_embd.weight", (64,)),
    ],
)
def test_wrong_shape(path, name, shape):
    with pytest.raises(UnsupportedModelError) as caught:
        load_with(path, add={name: np.ones(shape, np.float32)})
    assert name in str(caught.value)
    assert str(shape) in str(caught.value)


def test_whole_numbers_as_weights(path):
    """Every type that a file can hold can be a matrix."""
    raw = np.arange(64 * 64).reshape(64, 64).astype(np.int8)
    model = load_with(path, add={"blk.0.attn_q.weight": raw})
    assert model.weights.layers[0].attention.q.weight.type is GGMLType.I8


def test_zero_frequency_factors(path):
    with pytest.raises(ModelFileError, match=r"rope_freqs\.weight"):
        load_with(path, add={"rope_freqs.weight": np.zeros(8, np.float32)})


BAD_VALUES = [
    ("attention__head_count", 0),
    ("attention__head_count", -4),
    ("attention__head_count", 2**31),
    ("attention__head_count", 4.0),
    ("attention__head_count", True),
    ("attention__head_count", "4"),
    ("attention__head_count", None),
    ("attention__head_count", [4, 4, 4]),
    ("attention__head_count", [4, 0]),
    ("attention__head_count", 3),
    ("attention__head_count_kv", 3),
    ("attention__head_count_kv", 8),
    ("attention__key_length", 2**31 - 1),
    ("block_count", 0),
    ("block_count", 1),
    ("block_count", 2**31 - 1),
    ("block_count", 3),
    ("embedding_length", 63),
    ("embedding_length", 2**31 - 1),
    ("feed_forward_length", 0),
    ("feed_forward_length", 95),
    ("context_length", 0),
    ("context_length", None),
    ("attention__layer_norm_rms_epsilon", -1.0),
    ("attention__layer_norm_rms_epsilon", float("nan")),
    ("attention__layer_norm_rms_epsilon", None),
    ("attention__sliding_window", -1),
    ("rope__dimension_count", 17),
    ("rope__dimension_count", 32),
    ("rope__dimension_count", 15),
    ("rope__dimension_count", 0),
    ("rope__freq_base", 0.0),
    ("rope__freq_base", 1.0),
    ("rope__freq_base", float("inf")),
    ("rope__scaling__type", "spiral"),
    ("rope__scaling__type", 3),
    ("rope__scaling__factor", -2.0),
    ("rope__scaling__factor", 1e-30),
    ("rope__scaling__attn_factor", float("inf")),
    ("expert_count", 4),
    ("expert_count", -1),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=[f"{key}={value}" for key, value in BAD_VALUES])
def test_absurd_metadata(path, key, value):
    with pytest.raises(ModelFileError) as caught:
        load_with(path, **{key: value})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("llama", {"attention.key_length": 2**24, "rope.dimension_count": 2**24}),
        ("mpt", {"attention.head_count": 2**24, "attention.key_length": 16, "attention.value_length": 16}),
    ],
    ids=["rotated elements", "heads with linear biases"],
)
def test_tables_are_not_made_before_tensors_vouch_for_their_size(path, architecture, keys):
    meta, tensors = tiny_llama_parts(tokenizer=False, architecture=architecture)
    meta |= {f"{architecture}.{key}": value for key, value in keys.items()}
    if architecture == "mpt":
        meta |= {"mpt.attention.layer_norm_epsilon": 1e-5, "mpt.attention.max_alibi_bias": 8.0}
    tracemalloc.start()
    with pytest.raises(UnsupportedModelError, match=r"attn_(q|output)\.weight has shape"):
        load(path, meta, tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_errors_quote_key_value_and_range(path):
    with pytest.raises(ModelFileError) as caught:
        load_with(path, attention__head_count=-4)
    assert str(caught.value) == (
        f"{path}: metadata key llama.attention.head_count is -4; allowed is an integer from 1 to 2147483647"
    )


def test_keys_of_other_families_are_not_read(path):
    """Files carry keys with default values that their architecture does not use."""
    keys = {"attn_logit_softcapping": 50.0, "attention__max_alibi_bias": 0.0, "logit_scale": 0.0, "expert_count": 0}
    attention = load_with(path, **keys, ssm__inner_size=0, attention__causal=True).config.layers[0].attention
    assert (attention.softcap, attention.alibi) == (None, 0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention__temperature_scale", 0.5),
        ("attn_logit_softcapping", 20.0),
        ("attention__max_alibi_bias", 8.0),
        ("attention__clamp_kqv", 4.0),
        ("attention__key_length_swa", 32),
        ("logit_scale", 0.25),
        ("hyper_connection__count", 4),
        ("swiglu_clamp_exp", [0.0, 1.0]),
        ("rope__scaling__low_freq_factor", 1.0),
    ],
)
def test_keys_that_would_change_the_result(path, key, value):
    name = key.replace("__", ".")
    if key == "attention__key_length_swa":
        assert load_with(path, attention__key_length_swa=32).config.layers[0].attention.key_width == 16
        for value in (32, [16, 32]):
            with pytest.raises(UnsupportedModelError, match="key_length_swa is"):
                load_with(path, attention__key_length_swa=value, attention__sliding_window=4)
        return
    with pytest.raises(UnsupportedModelError, match=f"key llama.{name} is .*'llama' is not known to use"):
        load_with(path, **{key: value})


def test_scaling_of_zero_is_none(path):
    rope = load_with(path, rope__scaling__type="linear", rope__scaling__factor=0.0).config.layers[0].attention.rope
    assert (rope.scaling, rope.factor) == (RopeScaling.NONE, 1.0)


def test_experts(path):
    add = {}
    for i in range(2):
        add |= {
            f"blk.{i}.ffn_gate_inp.weight": np.ones((4, 64), np.float32),
            f"blk.{i}.ffn_gate_exps.weight": np.ones((4, 24, 64), np.float32),
            f"blk.{i}.ffn_up_exps.weight": np.ones((4, 24, 64), np.float32),
            f"blk.{i}.ffn_down_exps.weight": np.ones((4, 64, 24), np.float32),
        }
    drop = [f"blk.{i}.ffn_{name}.weight" for i in range(2) for name in ("gate", "up", "down")]
    keys = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24}
    model = load_with(path, drop=drop, add=add, **keys)
    moe = model.config.layers[0].ffn
    assert isinstance(moe, MoeConfig)
    assert (moe.n_experts, moe.n_used, moe.expert.width, moe.normalize, moe.weight_scale) == (4, 2, 24, True, 1.0)
    assert model.weights.layers[1].moe.down.expert(3).weight.shape == (64, 24)
    with pytest.raises(ModelFileError, match=r"expert_used_count is 5; allowed is an integer from 1 to 4"):
        load_with(path, drop=drop, add=add, **(keys | {"expert_used_count": 5}))
    with pytest.raises(UnsupportedModelError, match=r"ffn_gate_inp\.weight has shape \(4, 64\).*\(5, 64\)"):
        load_with(path, drop=drop, add=add, **(keys | {"expert_count": 5}))


VALUES = st.one_of(
    st.integers(-(2**31), 2**63 - 1),
    st.integers(-3, 300),
    st.floats(width=32),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 70), max_size=4).map(lambda items: np.array(items, np.int32)),
    st.sampled_from(["yarn", "linear", "none"]),
)
KEYS = st.sampled_from(
    [
        *sorted({key.replace("__", ".") for key, _ in BAD_VALUES}),
        "attention.temperature_scale",
        "rope.scaling.original_context_length",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_log_multiplier",
        "rope.scaling.finetuned",
        "rope.dimension_sections",
        "rope.freq_base_swa",
        "attention.sliding_window_pattern",
        "attention.scale",
        "attention.clamp_kqv",
        "attention.causal",
        "embedding_scale",
        "residual_scale",
        "logit_scale",
        "final_logit_softcapping",
        "expert_gating_func",
        "expert_used_count",
        "leading_dense_block_count",
        "unheard.of",
    ]
)


FUZZED = ["llama", "mistral3", "granite", "minicpm", "gemma", "smollm3", "qwen2vl"]
"""Families that the tiny model's tensors suffice for."""


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(KEYS, VALUES, min_size=1, max_size=4),
    architecture=st.sampled_from(FUZZED),
)
def test_any_metadata_loads_or_is_refused(path, changes, architecture):
    meta, tensors = tiny_llama_parts(tokenizer=False, architecture=architecture, vocab=272)
    path.unlink(missing_ok=True)
    try:
        model = load(path, meta | {f"{architecture}.{key}": value for key, value in changes.items()}, tensors)
    except ModelFileError:
        return
    rope = model.weights.layers[0].attention.rope
    if rope is not None:
        assert np.isfinite(rope.inv_freq).all()
        assert np.isfinite(rope.magnitude)


def test_errors_name_the_file(tmp_path):
    for data, words in (
        (tiny_llama(architecture="telepathy"), "telepathy"),
        (build_gguf({"general.architecture": "llama"}, {}), "only a vocabulary"),
    ):
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        with open_gguf(path) as gguf, pytest.raises(ModelFileError, match=words) as caught:
            load_model(gguf)
        assert str(caught.value).startswith(str(path))
