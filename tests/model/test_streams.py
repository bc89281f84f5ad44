"""What layers share and keep beside their parts: caches, vectors of their own, and several streams."""

import numpy as np
import pytest

from engine.cpu.backend import CpuBackend
from engine.cuda.load.features import missing_features
from engine.errors import ModelFileError, UnsupportedModelError
from engine.gguf.reader import open_gguf
from engine.model.loader import load_model
from tests.support.peers.gemma import gemma3n, small_gemma4
from tests.support.peers.models import written


def test_layers_that_share_a_cache_take_no_memory(tmp_path):
    with open_gguf(written(small_gemma4(), tmp_path)) as gguf:
        model = load_model(gguf)
        assert [layer.attention.cache_layer for layer in model.config.layers] == [None] * 4 + [2, 3]
        backend = CpuBackend(model, context_length=64, kv_type="f16")
        per_layer = [layer.bytes_per_token for layer in backend.cache.layers]
        assert per_layer == [256, 64, 256, 64, 0, 0]
        assert backend.memory_plan().kv_bytes_per_token == sum(per_layer)
        backend.close()
        del model, backend


@pytest.mark.parametrize(
    ("make", "key", "value", "words"),
    [
        (small_gemma4, "attention.shared_kv_layers", 5, "leaves 1 layers with a cache.*has no window"),
        (small_gemma4, "attention.shared_kv_layers", 7, "allowed is an integer from 0 to 6"),
        (small_gemma4, "attention.key_length_swa", 64, "has shape"),
        (small_gemma4, "embedding_length_per_layer_input", 2**20, "allowed is an integer from 0 to 65536"),
        (small_gemma4, "rope.dimension_count_swa", 15, "allowed is an even number"),
        (gemma3n, "altup.num_inputs", 1, "allowed is an integer from 2"),
        (gemma3n, "altup.active_idx", 4, "allowed is an integer from 0 to 3"),
        (gemma3n, "activation_sparsity_scale", np.ones(3, np.float32), "one value or 25, one per layer"),
        (gemma3n, "activation_sparsity_scale", float("nan"), "a finite number"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, make, key, value, words):
    file = make()
    file.meta[key] = value
    with (
        open_gguf(written(file, tmp_path)) as gguf,
        pytest.raises((ModelFileError, UnsupportedModelError), match=words),
    ):
        load_model(gguf)


@pytest.mark.parametrize("make", [small_gemma4, gemma3n])
def test_gpus_have_all_of_their_features(tmp_path, make):
    with open_gguf(written(make(), tmp_path)) as gguf:
        assert not missing_features(load_model(gguf))
