"""Tiny random models of every supported architecture against logits computed by llama.cpp in float32."""

import numpy as np
import pytest

from engine.cpu.backend import CpuBackend
from engine.gguf.reader import open_gguf
from engine.model.architectures import ARCHITECTURES
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model
from tests.support.conformance import BY_FORMULA, ENCODERS, NAMES, SAME_AS, error

pytestmark = pytest.mark.shared


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "kernels"])
@pytest.mark.parametrize("name", NAMES)
def test_logits(name, reference, conformance):
    """All tokens at once and one by one."""
    path, logits = conformance(name)
    expected = np.load(logits)
    tokens, logits = expected["tokens"], expected["logits"]
    with open_gguf(path) as gguf:
        backend = CpuBackend(load_model(gguf), kv_type="f32", max_sequences=2, threads=2, reference=reference)
        at_once = backend.forward(Batch.build([(0, tokens, 0, Outputs.ALL)]))
        single = [backend.forward(Batch.build([(1, [token], i, Outputs.ALL)])) for i, token in enumerate(tokens)]
        backend.close()
        del backend
    assert error(at_once, logits) < 1e-8
    assert error(np.concatenate(single), logits) < 1e-8


def test_every_architecture_is_covered():
    measured = {name.rsplit("-", 1)[0] for name in NAMES}
    assert measured | SAME_AS | ENCODERS | BY_FORMULA == set(ARCHITECTURES)
    assert not measured & (SAME_AS | ENCODERS)
