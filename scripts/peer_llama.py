"""llama.cpp as the reference: models opened in float32 through llama-cpp-python, which the interpreter must have."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp

F32 = 0
"""ggml's id of the type, for the cache."""
VERSION = f"llama-cpp-python {llama_cpp.__version__}"
_silent = llama_cpp.llama_log_callback(lambda *_: None)


@contextmanager
def opened(path: Path, n_ctx: int, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """A model and its context on the CPU, with a float32 cache and without flash attention; llama.cpp says nothing.

    Args:
        path: a GGUF file.
        n_ctx: positions of the context.
        settings: further fields of llama_context_params.
    """
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    loading = llama_cpp.llama_model_default_params()
    loading.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
    assert model, f"llama.cpp cannot load {path}"
    run = llama_cpp.llama_context_default_params()
    run.n_ctx, run.type_k, run.type_v, run.flash_attn_type, run.swa_full = n_ctx, F32, F32, 0, True
    for name, value in settings.items():
        setattr(run, name, value)
    context = llama_cpp.llama_init_from_model(model, run)
    try:
        yield model, context
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


@contextmanager
def batch_of(ids: Sequence[int]) -> Iterator[Any]:
    """A batch of one sequence from its beginning, which has outputs for every token."""
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    try:
        yield batch
    finally:
        llama_cpp.llama_batch_free(batch)
