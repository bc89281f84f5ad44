"""Stores llama.cpp's vectors of the models in tests/support/models/embedding_models.py, for test_peer_embeddings.py.

    /path/to/venv/bin/python -m scripts.peer_embeddings

The interpreter is one that has numpy and llama-cpp-python (`pip install llama-cpp-python`; its version is stored, too).
All of it is in float32, without flash attention, one text at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from scripts.peer_llama import VERSION, batch_of, opened
from tests.support.models.embedding_models import COLUMNS, CONTEXT, MODELS, NAMES, TARGET, TEXTS, TOKEN_VECTORS_OF


def vectors(path: Path, texts: Sequence[Sequence[int]], pooling: int, width: int) -> list[npt.NDArray[np.float32]]:
    """For each text one vector (1, width), or one per token (T, width) where pooling is none."""
    sizes = {"n_batch": CONTEXT, "n_ubatch": CONTEXT}
    found = []
    with opened(path, CONTEXT, embeddings=True, pooling_type=pooling, **sizes) as (model, context):
        call = llama_cpp.llama_encode if llama_cpp.llama_model_has_encoder(model) else llama_cpp.llama_decode
        for ids in texts:
            memory = llama_cpp.llama_get_memory(context)
            if memory:
                llama_cpp.llama_memory_clear(memory, True)
            with batch_of(ids) as batch:
                assert call(context, batch) == 0
            if pooling == NAMES["none"]:
                rows = [llama_cpp.llama_get_embeddings_ith(context, i) for i in range(len(ids))]
            else:
                rows = [llama_cpp.llama_get_embeddings_seq(context, 0)]
            found.append(np.array([np.ctypeslib.as_array(row, (width,)) for row in rows]))
    return found


def main() -> None:
    """Write all vectors into one file."""
    arrays: dict[str, Any] = {"version": np.array(VERSION)}
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
