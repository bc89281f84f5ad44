"""Stores llama.cpp's logits of the models in tests/support/peers/models.py, for tests/model/test_peer_logits.py.

    /path/to/venv/bin/python -m scripts.peer_logits               all models
    /path/to/venv/bin/python -m scripts.peer_logits gemma4 "yarn"    these alone

The interpreter is one that has numpy and llama-cpp-python (`pip install llama-cpp-python`; its version is stored, too).
All of it is in float32: weights, cache and products, without flash attention, all tokens in one batch.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

from scripts.peer_llama import VERSION, batch_of, opened
from tests.support.peers.models import LOGITS, MODELS, RUN_CONTEXT, logits_file, shown, tokens_of, written


def logits(path: Path, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits (T, V) of tokens; fails where llama.cpp refuses the file."""
    with opened(path, RUN_CONTEXT) as (model, context), batch_of(tokens) as batch:
        assert llama_cpp.llama_decode(context, batch) == 0
        width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(tokens), width)).copy()


def main() -> None:
    """Write the logits of the models named as arguments, or of all."""
    names = sys.argv[1:] or list(MODELS)
    LOGITS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            file = MODELS[name]()
            np.save(logits_file(name), shown(logits(written(file, Path(folder)), tokens_of(file))))
    (LOGITS / "version.txt").write_text(f"{VERSION}\n")
    print(f"{LOGITS}: {len(names)} models")


if __name__ == "__main__":
    main()
