"""Models with parts that have no GPU kernels are declined by name, and run on the CPU where the device is free."""

import logging

import pytest
from feature_models import CASES, latent, multipliers, sinks_and_clamped_gates, unrotated_layers
from gguf_builder import tiny_llama

from engine import runner
from engine.config import EngineConfig
from engine.cuda.features import check_features, missing_features
from engine.cuda.plan import make_plan
from engine.errors import DeviceError
from engine.gguf.reader import open_gguf
from engine.model.loader import load_model
from engine.runner import CpuRunner, open_runner

SERVED = {"second_norm_renamed", "unrotated_layers"}
"""Cases of feature_models whose parts have GPU kernels."""


@pytest.mark.parametrize("case", [*CASES, latent], ids=lambda case: case.__name__)
def test_only_served_parts_pass(tmp_path, case):
    file, _ = case(True) if case is latent else case()
    with open_gguf(file.write(tmp_path)) as gguf:
        model = load_model(gguf)
        assert bool(missing_features(model)) == (case.__name__ not in SERVED)
        del model


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (multipliers, "scaled embeddings, scaled logits, scaled residuals"),
        (sinks_and_clamped_gates, "attention sinks, this routing of experts, this activation"),
        (lambda: latent(True), "latent attention, .*groups of experts, a bias in the choice"),
    ],
)
def test_errors_name_the_parts(tmp_path, case, words):
    file, _ = case()
    with open_gguf(file.write(tmp_path)) as gguf:
        model = load_model(gguf)
        with pytest.raises(DeviceError, match=f"which lacks: {words}.*; use device='cpu'"):
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
    with open_gguf(unrotated_layers()[0].write(tmp_path)) as gguf:
        model = load_model(gguf)
        check_features(model)
        del model


def test_a_free_choice_falls_back_to_the_cpu(tmp_path, monkeypatch, caplog):
    path = multipliers()[0].write(tmp_path)
    monkeypatch.setattr(runner, "_GPU_TRACES", (str(tmp_path),))
    monkeypatch.setattr("engine.cuda.availability", lambda index=0: None)
    with open_gguf(path) as gguf, caplog.at_level(logging.WARNING, "engine"):
        model = load_model(gguf)
        opened = open_runner(EngineConfig(model=path, device="auto", threads=1), model, lambda _: None)
        opened.close()
        assert isinstance(opened, CpuRunner)
        del model, opened
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [
        "running on the CPU: the GPU has no kernels yet for scaled embeddings, scaled logits, scaled residuals"
    ]
