"""Stores llama.cpp's vectors of the models in tests/support/embedding_models.py, for test_peer_embeddings.py.

    /path/to/venv/bin/python -m scripts.peer_embeddings

The interpreter is one that has numpy and llama-cpp-python (`pip install llama-cpp-python`; its version is stored, too).
All of it is in float32, without flash attention, one text at a time.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from tests.support.embedding_models import COLUMNS, CONTEXT, MODELS, NAMES, TARGET, TEXTS, TOKEN_VECTORS_OF

F32 = 0
"""ggml's id of the type, for the cache."""


def vectors(path: Path, texts: Sequence[Sequence[int]], pooling: int, width: int) -> list[npt.NDArray[np.float32]]:
    """For each text one vector (1, width), or one per token (T, width) where pooling is none."""
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    assert model, f"llama.cpp cannot load {path}"
    run = llama_cpp.llama_context_default_params()
    run.n_ctx = run.n_batch = run.n_ubatch = CONTEXT
    run.type_k, run.type_v, run.flash_attn_type, run.swa_full = F32, F32, 0, True
    run.embeddings, run.pooling_type = True, pooling
    context = llama_cpp.llama_init_from_model(model, run)
    found = []
    for ids in texts:
        memory = llama_cpp.llama_get_memory(context)
        if memory:
            llama_cpp.llama_memory_clear(memory, True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        call = llama_cpp.llama_encode if llama_cpp.llama_model_has_encoder(model) else llama_cpp.llama_decode
        assert call(context, batch) == 0
        if pooling == NAMES["none"]:
            rows = [
                np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_ith(context, i), (width,)) for i in range(len(ids))
            ]
        else:
            rows = [np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_seq(context, 0), (width,))]
        found.append(np.array(rows))
        llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return found


def main() -> None:
    """Write all vectors into one file."""
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    arrays: dict[str, Any] = {"version": np.array(f"llama-cpp-python {llama_cpp.__version__}")}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in MODELS.items():
            file = make()
            path, pooling = file.written(Path(folder)), file.meta["pooling_type"]
            width = file.meta["embedding_length"]
            labels = len(file.meta.get("classifier.output_labels", [""]))
            rank = pooling == NAMES["rank"]
            arrays[name] = np.concatenate(vectors(path, TEXTS, pooling, labels if rank else width))
            if not rank:
                arrays[f"{name}: tokens"] = vectors(path, [TEXTS[TOKEN_VECTORS_OF]], NAMES["none"], width)[0][
                    :, :COLUMNS
                ]
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(TARGET, **arrays)
    print(f"{TARGET}: {len(MODELS)} models, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
