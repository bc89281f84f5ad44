"""Stores llama.cpp's logits of the models in tests/support/peer_models.py, for tests/model/test_peer_logits.py.

    /path/to/venv/bin/python -m scripts.peer_logits               all models
    /path/to/venv/bin/python -m scripts.peer_logits gemma4 "yarn"    these alone

The interpreter is one that has numpy and llama-cpp-python (`pip install llama-cpp-python`; its version is stored, too).
All of it is in float32: weights, cache and products, without flash attention, all tokens in one batch.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

from tests.support.naive_model import TOKENS
from tests.support.peer_models import LOGITS, MODELS, RUN_CONTEXT, logits_file, shown, written

F32 = 0
"""ggml's id of the type, for the cache."""


def logits(path: Path) -> npt.NDArray[np.float32]:
    """Logits (T, V) of TOKENS; fails where llama.cpp refuses the file."""
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    assert model, f"llama.cpp cannot load {path}"
    run = llama_cpp.llama_context_default_params()
    run.n_ctx, run.type_k, run.type_v, run.flash_attn_type, run.swa_full = RUN_CONTEXT, F32, F32, 0, True
    context = llama_cpp.llama_init_from_model(model, run)
    batch = llama_cpp.llama_batch_init(len(TOKENS), 0, 1)
    batch.n_tokens = len(TOKENS)
    for i, token in enumerate(TOKENS):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(TOKENS), width)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return found


def main() -> None:
    """Write the logits of the models named as arguments, or of all."""
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    names = sys.argv[1:] or list(MODELS)
    LOGITS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            np.save(logits_file(name), shown(logits(written(MODELS[name](), Path(folder)))))
    (LOGITS / "version.txt").write_text(f"llama-cpp-python {llama_cpp.__version__}\n")
    print(f"{LOGITS}: {len(names)} models")


if __name__ == "__main__":
    main()
