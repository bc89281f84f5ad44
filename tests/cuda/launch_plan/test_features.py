"""Models with parts that have no GPU kernels are declined by name, and run on the CPU where the device is free."""

import logging
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import partial

import pytest

from engine.config import EngineConfig, KvType
from engine.cpu.runner import CpuRunner
from engine.cuda.load import features
from engine.cuda.load.features import check_features, missing_features
from engine.cuda.load.memory_plan import make_plan
from engine.errors import DeviceError
from engine.gguf.reader import open_gguf
from engine.model.config import (
    Activation,
    AttentionConfig,
    DeltaNetConfig,
    FfnConfig,
    KimiDeltaConfig,
    LayerConfig,
    Mamba2Config,
    MambaConfig,
    ModelConfig,
    MoeConfig,
    RecurrentConfig,
    Routing,
    ShortConvConfig,
)
from engine.model.loader import load_model
from engine.runner import devices as runner
from engine.runner.devices import open_runner
from tests.support.models.compressed_models import compressed
from tests.support.models.feature_models import (
    CASES,
    EXPERT,
    LATENT_CASES,
    MOE,
    latent,
    sinks_and_clamped_gates,
    unrotated_layers,
)
from tests.support.models.gguf_builder import tiny_llama
from tests.support.models.hybrid_models import FAMILIES, tiny_hybrid
from tests.support.models.indexer_models import blocks
from tests.support.models.naive_model import ATTENTION, GATED, NORMS, WIDTH, File
from tests.support.models.recurrent_models import tiny_mamba
from tests.support.peers.models import GPU_MODELS


def too_many_experts():
    file = File("llama", expert_count=40, expert_used_count=33, expert_feed_forward_length=EXPERT)
    experts = [("ffn_gate_inp", (40, WIDTH)), ("ffn_down_exps", (40, WIDTH, EXPERT))]
    experts += [(f"ffn_{which}_exps", (40, EXPERT, WIDTH)) for which in ("gate", "up")]
    return file.layers(matrices=ATTENTION + experts, norms=NORMS)


def _name(case):
    if isinstance(case, partial):
        return f"{case.func.__name__}{case.args}"
    return case.__name__


@pytest.mark.parametrize("name", GPU_MODELS)
def test_families_of_known_parts_are_served(tmp_path, name):
    with open_gguf(GPU_MODELS[name]().write(tmp_path)) as gguf:
        model = load_model(gguf)
        assert missing_features(model) == []
        del model


@pytest.mark.parametrize("case", [*CASES, *(partial(latent, *case) for case in LATENT_CASES)], ids=_name)
def test_every_part_that_a_model_may_have_is_served(tmp_path, case):
    file, _ = case()
    with open_gguf(file.write(tmp_path)) as gguf:
        model = load_model(gguf)
        assert missing_features(model) == []
        del model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hybrid_is_served(tmp_path, family):
    with open_gguf(tiny_hybrid(tmp_path / "tiny.gguf", family)) as gguf:
        model = load_model(gguf)
        assert missing_features(model) == []
        del model


def test_a_name_that_is_always_served_means_one_thing():
    """Fields are looked up by name: a field of the same name elsewhere would be taken for served, too."""
    configs = (ModelConfig, LayerConfig, AttentionConfig, FfnConfig, MoeConfig, MambaConfig, KimiDeltaConfig)
    owners = Counter(field.name for kind in configs for field in fields(kind))
    several = {name: owners[name] for name in features._ANY if owners[name] != 1}
    assert several == {"per_layer_width": 2, "streams": 2}, "of a model and of its layers: the same vectors"


@dataclass(frozen=True, kw_only=True)
class NewMixer(RecurrentConfig):
    """A mixer that kernels were not written for."""

    state_shapes = ((4, 4),)
    row_width = 4


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        (NewMixer(), ["this kind of recurrent layers"]),
        (ShortConvConfig(inner=4, conv_width=1), ["convolutions over other than 2 to 8 tokens"]),
        (
            Mamba2Config(inner=8, state=257, conv_width=4, heads=2, groups=1),
            ["recurrent layers with more than 256 states of a channel"],
        ),
        (
            DeltaNetConfig(key_heads=1, heads=1, head_width=129, conv_width=4, grouped=True),
            ["delta rules with heads of more than 128 columns"],
        ),
    ],
)
def test_recurrent_mixers_that_no_kernel_serves_are_declined_by_name(tmp_path, mixer, words):
    with open_gguf(tiny_mamba(tmp_path / "tiny.gguf", n_layers=1)) as gguf:
        model = load_model(gguf)
        (layer,) = model.weights.layers
        changed = replace(layer, config=replace(layer.config, mixer=mixer))
        model = replace(model, weights=replace(model.weights, layers=(changed,)))
        assert missing_features(model) == words
        del model, layer, changed


@pytest.mark.parametrize(
    ("field", "served", "words"),
    [
        ("activation", {Activation.SILU}, "this activation"),
        ("routing", {Routing.SOFTMAX}, "this routing of experts"),
        ("sinks", {False}, "sinks"),
    ],
)
def test_parts_that_nobody_added_are_declined_by_name(tmp_path, monkeypatch, field, served, words):
    monkeypatch.setitem(features._SERVED, field, frozenset(served))
    with open_gguf(sinks_and_clamped_gates()[0].write(tmp_path)) as gguf:
        model = load_model(gguf)
        assert missing_features(model) == [words]
        del model


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, []),
        ({"norm_dt_b_c": True}, []),
        ({"state": 257}, ["recurrent layers with more than 256 states of a channel"]),
        ({"conv": 9}, ["convolutions over other than 2 to 8 tokens"]),
    ],
)
def test_recurrent_layers(tmp_path, parts, words):
    with open_gguf(tiny_mamba(tmp_path / "tiny.gguf", **parts)) as gguf:
        model = load_model(gguf)
        assert missing_features(model) == words
        del model


def test_experts_that_a_token_names_twice(tmp_path):
    """The kernels leave out the others, so that one that counts twice would count once."""
    file = compressed()
    file.tensors["blk.0.ffn_gate_tid2eid.weight"][5] = [1, 1]
    with open_gguf(file.write(tmp_path)) as gguf:
        model = load_model(gguf)
        assert missing_features(model) == ["experts that a token names twice"]
        del model


def test_errors_name_the_parts(tmp_path):
    with open_gguf(too_many_experts().write(tmp_path)) as gguf:
        model = load_model(gguf)
        with pytest.raises(DeviceError, match=r"which lacks: more than 32 of 1024 experts.*; use device='cpu'"):
            check_features(model)
        with pytest.raises(DeviceError, match="does not run on the GPU yet"):
            make_plan(model, context_length=32, kv_type="f16", max_sequences=1)
        del model


def test_plain_models_pass(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_llama(path)
    with open_gguf(path) as gguf:
        model = load_model(gguf)
        check_features(model)
        del model
    guessing = File("glm4moe", 2, nextn_predict_layers=1, leading_dense_block_count=1, expert_shared_count=1, **MOE)
    guessing.layers(matrices=ATTENTION + GATED, norms=[NORMS[0], ("post_attention_norm", (WIDTH,))])
    for file in (unrotated_layers()[0], guessing):
        with open_gguf(file.write(tmp_path)) as gguf:
            model = load_model(gguf)
            check_features(model)
            del model


def test_indexers_do_not_read_a_cache_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "check_kv_type", lambda *_: None)  # these heads are too narrow anyway
    with open_gguf(blocks()[0].write(tmp_path)) as gguf:
        model = load_model(gguf)
        check_features(model, KvType.F16)
        with pytest.raises(DeviceError, match="'minimax-m3' has an indexer, which reads caches of f16 and f32 alone"):
            check_features(model, KvType.Q8_0)
        del model


def test_a_free_choice_falls_back_to_the_cpu(tmp_path, monkeypatch, caplog):
    path = too_many_experts().write(tmp_path)
    monkeypatch.setattr(runner, "_GPU_TRACES", (str(tmp_path),))
    monkeypatch.setattr("engine.cuda.availability", lambda index=0: None)
    with open_gguf(path) as gguf, caplog.at_level(logging.WARNING, "engine"):
        model = load_model(gguf)
        opened = open_runner(EngineConfig(model=path, device="auto", threads=1), model, lambda _: None)
        opened.close()
        assert isinstance(opened, CpuRunner)
        del model, opened
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == ["running on the CPU: the GPU has no kernels yet for more than 32 of 1024 experts for a token"]
