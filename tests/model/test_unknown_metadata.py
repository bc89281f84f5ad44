"""Keys and tensors that a family does not read: unknown ones are named in one warning, those that matter are refused.

Names as llama.cpp and as Ollama's converters write them.
"""

import logging
from dataclasses import replace

import gguf
import numpy as np
import pytest

from engine.errors import UnsupportedModelError
from engine.gguf.reader import open_gguf
from engine.model.architectures import _ALL, ARCHITECTURES, OTHER_NAMES, find_architecture
from engine.model.config import FfnConfig, MoeConfig
from engine.model.loader import load_model
from engine.model.reading.metadata import ALIASES
from engine.model.reading.unread_keys import HARMLESS, MATTER_WITHIN, MATTERS, OTHER_SENSES
from tests.support.models.gguf_builder import build_gguf, tiny_llama_parts

GEMMA3 = {"attention.sliding_window": 8, "attention.key_length": 16, "attention.value_length": 16}


def load(folder, architecture="llama", keys=None, tensors=None, *, drop=(), strict=False):
    """The configuration of the tiny model with keys (without their prefix) and tensors added, and keys dropped."""
    meta, own = tiny_llama_parts(tokenizer=False, architecture=architecture)
    for name in drop:
        del meta[f"{architecture}.{name}"]
    if architecture == "gemma3":
        for layer in range(2):
            for name, width in (("post_attention_norm", 64), ("post_ffw_norm", 64), ("attn_q_norm", 16)):
                own[f"blk.{layer}.{name}.weight"] = np.ones(width, np.float32)
            own[f"blk.{layer}.attn_k_norm.weight"] = np.ones(16, np.float32)
    meta |= {f"{architecture}.{key}": value for key, value in (keys or {}).items()}
    path = folder / "tiny.gguf"
    path.write_bytes(build_gguf(meta, own | (tensors or {})))
    with open_gguf(path) as file:
        return load_model(file, strict=strict).config


def test_unknown_names_are_one_warning(tmp_path, caplog):
    keys = {"deltas": [0.0, 1.0], "invented.mode": "sideways", "image_token_index": 10}
    tensors = {name: np.ones(4, np.float32) for name in ("v.blk.0.attn_q.weight", "mm.0.bias", "cls.weight", "junk")}
    plain = load(tmp_path)
    with caplog.at_level(logging.WARNING, "engine"):
        assert load(tmp_path, keys=keys, tensors=tensors) == plain
    (record,) = caplog.records
    for name in (*(f"llama.{key}" for key in keys), *tensors, "tiny.gguf", "--strict"):
        assert name in record.getMessage()


@pytest.mark.parametrize(
    ("keys", "tensors", "words"),
    [({"invented.mode": "x"}, (), "key llama.invented.mode is 'x'"), ({}, ("mm.0.bias",), "no use for .* mm.0.bias")],
)
def test_strict_refuses_them(tmp_path, keys, tensors, words):
    with pytest.raises(UnsupportedModelError, match=words):
        load(tmp_path, keys=keys, tensors={name: np.ones(4, np.float32) for name in tensors}, strict=True)


def test_a_file_without_unknown_names_is_silent(tmp_path, caplog):
    keys = {"attention.head_dim": 16, "max_position_embeddings": 128, "vision.block_count": 3, "logit_scale": 0.0}
    assert load(tmp_path, keys=keys, strict=True) == load(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("name", ["token_embd_norm.weight", "output_norm.bias", "rope_factors_long.weight", "enc.x"])
def test_tensors_that_take_part_are_refused(tmp_path, name):
    with pytest.raises(UnsupportedModelError, match=f"no use for these tensors: {name}"):
        load(tmp_path, tensors={name: np.ones(64, np.float32)})


def test_every_key_of_the_gguf_package_is_known():
    """None of them may fall among those that are only warned about."""
    templates = [
        value
        for group in vars(gguf.Keys).values()
        if isinstance(group, type)
        for value in vars(group).values()
        if isinstance(value, str) and value.startswith("{arch}.")
    ]
    keys = {key.removeprefix("{arch}.").replace("{dense}", "dense_2") for key in templates}
    read_by_all = {"block_count", "context_length", "embedding_length", "attention.head_count"}
    read_by_all |= {"attention.head_count_kv"}
    unknown = [
        key
        for key in keys - read_by_all - HARMLESS - MATTERS
        if not key.startswith(MATTER_WITHIN) and not key.startswith(OTHER_SENSES)
    ]
    assert len(keys) > 100
    assert unknown == []


def test_the_bases_of_gemma_3_from_ollama(tmp_path, caplog):
    """Its converter writes other names, and leaves out what all models of the family have in common."""
    written = GEMMA3 | {"rope.local.freq_base": 20000.0, "rope.global.freq_base": 500000.0}
    usual = GEMMA3 | {"rope.freq_base_swa": 20000.0, "rope.freq_base": 500000.0}
    config = load(tmp_path, "gemma3", written, drop=["rope.freq_base"], strict=True)
    assert config == load(tmp_path, "gemma3", usual)
    assert [layer.attention.rope.base for layer in config.layers] == [20000.0, 20000.0]
    bare = load(tmp_path, "gemma3", GEMMA3 | {"attention.sliding_window_pattern": [True, False]})
    assert bare.layers[1].attention.rope.base == 10000.0  # as stated
    drop = ["rope.freq_base", "attention.layer_norm_rms_epsilon"]
    bare = load(tmp_path, "gemma3", GEMMA3 | {"attention.sliding_window_pattern": [True, False]}, drop=drop)
    assert [layer.attention.rope.base for layer in bare.layers] == [10000.0, 1000000.0]
    assert bare.norm_epsilon == 1e-6
    assert not caplog.records


def test_scaling_as_ollama_names_it(tmp_path, caplog):
    common = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
    }
    other = {
        "rope.scaling.beta_fast": 30.0,
        "rope.scaling.beta_slow": 2.0,
        "rope.scaling.extrapolation_factor": 0.5,
        "rope.scaling.mscale": 1.0,
        "rope.scaling.mscale_all_dim": 1.0,
        "rope.scaling_beta": 0.25,
    }
    usual = {
        "rope.scaling.yarn_beta_fast": 30.0,
        "rope.scaling.yarn_beta_slow": 2.0,
        "rope.scaling.yarn_ext_factor": 0.5,
        "rope.scaling.yarn_log_multiplier": 1.0,
        "attention.temperature_scale": 0.25,
    }
    config = load(tmp_path, "mistral3", common | other, strict=True)
    assert config == load(tmp_path, "mistral3", common | usual)
    assert config != load(tmp_path, "mistral3", common)
    assert not caplog.records


def test_head_widths_of_their_own(tmp_path):
    """attention.head_dim says what key_length and value_length would say."""
    tensors = {}
    for layer in range(2):
        tensors |= {f"blk.{layer}.attn_q.weight": np.ones((128, 64), np.float32)}
        tensors |= {f"blk.{layer}.attn_{name}.weight": np.ones((64, 64), np.float32) for name in "kv"}
        tensors |= {f"blk.{layer}.attn_output.weight": np.ones((64, 128), np.float32)}
    attention = load(tmp_path, keys={"attention.head_dim": 32}, tensors=tensors, strict=True).layers[1].attention
    assert (attention.key_width, attention.value_width) == (32, 32)


def test_the_usual_name_goes_first(tmp_path, caplog):
    keys = {"rope.global.freq_base": 500000.0}  # rope.freq_base is 10000
    assert load(tmp_path, keys=keys) == load(tmp_path)
    assert "llama.rope.global.freq_base" in caplog.text
    with pytest.raises(UnsupportedModelError, match=r"rope.global.freq_base is 500000"):
        load(tmp_path, keys=keys, strict=True)


def test_an_alias_that_is_not_served_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"key llama.rope.scaling_beta is 0.5"):
        load(tmp_path, keys={"rope.scaling_beta": 0.5})
    with pytest.raises(UnsupportedModelError, match=r"key llama.rope.freq_scale is 0.125"):
        load(tmp_path, keys={"rope.freq_scale": 0.125})


def test_aliases_are_no_usual_names():
    assert not set(ALIASES) & {name for names in ALIASES.values() for name in names}


def test_every_architecture_has_a_name_that_converters_write():
    # llama.cpp's, and in no release of the gguf package yet
    newer = {
        "bailingmoe3", "cohere2moe", "deepseek32", "deepseek4", "dots3note", "glm5-next", "granite_swa", "hrm_text",
        "hy_v3", "hy_v4", "kimi-k3", "laguna", "maple", "mellum", "minimax-01", "minimax-m3", "muse-glimmer",
        "nanbeige", "qwen4exp", "spark2_5", "talkie",
    }  # fmt: skip
    assert set(ARCHITECTURES) <= set(gguf.MODEL_ARCH_NAMES.values()) | newer


def test_names_of_other_converters(tmp_path):
    sections = {"rope.mrope_section": [2, 3, 3]}
    for name, usual in OTHER_NAMES.items():
        assert replace(find_architecture(name), name=usual) == ARCHITECTURES[usual]
        config = load(tmp_path, name, sections, strict=True)
        assert replace(config, architecture=usual) == load(tmp_path, usual, {"rope.dimension_sections": [2, 3, 3, 0]})
    with pytest.raises(UnsupportedModelError, match=r"'gptoss' is not supported .*'gpt-oss'"):
        find_architecture("gptoss")


def test_no_architecture_is_described_twice():
    assert len(_ALL) == len(ARCHITECTURES)


def test_experts_in_every_second_layer(tmp_path):
    """ERNIE 4.5 says from which layer on, and at which distance, layers have experts."""
    experts = {"ffn_gate_exps": (2, 16, 64), "ffn_up_exps": (2, 16, 64), "ffn_down_exps": (2, 64, 16)}
    tensors = {f"blk.1.{name}.weight": np.ones(shape, np.float32) for name, shape in experts.items()}
    tensors["blk.1.ffn_gate_inp.weight"] = np.ones((2, 64), np.float32)
    keys = {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 16}
    meta, own = tiny_llama_parts(tokenizer=False, architecture="ernie4_5-moe")
    tensors |= {name: own[name] for name in own if not name.startswith("blk.1.ffn_") or "norm" in name}
    path = tmp_path / "ernie.gguf"

    def kinds(**more):
        added = {f"ernie4_5-moe.{key}": value for key, value in (keys | more).items()}
        path.write_bytes(build_gguf(meta | added, tensors))
        with open_gguf(path) as file:
            return [type(layer.ffn) for layer in load_model(file, strict=True).config.layers]

    assert kinds(interleave_moe_layer_step=2) == [FfnConfig, MoeConfig]
    assert kinds(interleave_moe_layer_step=1, leading_dense_block_count=1) == [FfnConfig, MoeConfig]
    with pytest.raises(UnsupportedModelError, match=r"blk.0.ffn_gate_inp.weight is missing"):
        kinds(interleave_moe_layer_step=1)
