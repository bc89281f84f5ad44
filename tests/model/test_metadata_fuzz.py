"""Metadata of every family with wrong values: a file loads or is refused with an error that names it."""

from functools import cache

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import ModelFileError
from engine.gguf.reader import open_gguf
from engine.model.loader import load_model
from engine.model.reading.unread_keys import MATTERS
from tests.support.models.gguf_builder import build_gguf
from tests.support.models.hybrid_models import FAMILIES, tiny_hybrid_parts
from tests.support.models.naive_model import File
from tests.support.peers.models import MODELS

WRITTEN = {
    "attention.indexer.top_k", "kda.gate_lower_bound", "kda.head_dim", "rope.scaling.attn_factor",
    "rope.scaling.factor", "rope.scaling.type", "shortconv.l_cache", "ssm.conv_kernel", "ssm.group_count",
    "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank",
}  # fmt: skip
"""Keys of which unread_keys.py knows the beginnings only."""

VALUES = st.one_of(
    st.integers(-(2**31), 2**63 - 1),
    st.integers(-3, 300),
    st.floats(width=32),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 70), max_size=6).map(lambda items: np.array(items, np.int32)),
    st.lists(st.floats(width=32), max_size=6).map(lambda items: np.array(items, np.float32)),
    st.sampled_from(["yarn", "linear", "longrope", "none"]),
)


@cache
def parts(name):
    """Architecture, metadata and tensors of a model that loads."""
    file = MODELS[name]() if name in MODELS else None
    if isinstance(file, File):
        return file.arch, file.meta, file.tensors
    name = name if file is None else file.family
    meta, tensors = tiny_hybrid_parts(name)
    return name, {key.removeprefix(f"{name}."): value for key, value in meta.items() if name in key}, tensors


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted({*MODELS, *FAMILIES})))
def test_any_metadata_loads_or_is_refused(tmp_path, data, name):
    arch, meta, tensors = parts(name)
    keys = st.sampled_from(sorted(meta)) | st.sampled_from(sorted(MATTERS | WRITTEN))
    changes = data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=3))
    path = tmp_path / "model.gguf"
    path.unlink(missing_ok=True)
    stated = {f"{arch}.{key}": value for key, value in (meta | changes).items()}
    path.write_bytes(build_gguf({"general.architecture": arch} | stated, tensors))
    refused = ""
    with open_gguf(path) as gguf:
        try:
            model = load_model(gguf)
        except ModelFileError as error:
            refused = str(error)
        if refused:
            assert str(path) in refused
            return
        ropes = [layer.config.attention_part and layer.attention.rope for layer in model.weights.layers]
        assert all(np.isfinite(rope.inv_freq).all() and np.isfinite(rope.magnitude) for rope in ropes if rope)
        del model
