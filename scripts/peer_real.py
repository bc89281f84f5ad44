"""Stores what llama.cpp makes of two published models, in float32 throughout, for tests/api/test_real_models.py.

    /path/to/venv/bin/python -m scripts.peer_real FOLDER

FOLDER holds the files that tests/support/peers/real_models.py names. The interpreter has numpy, llama-cpp-python, and
what the engine needs: llama.cpp reads a copy whose matrices are float32, so that its products round nothing.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from engine import LLM
from engine.gguf.quantizers.rewrite import rewrite
from engine.gguf.reader import open_gguf
from engine.gguf.types import GGMLType
from scripts.peer_llama import VERSION, opened
from scripts.requantize import choose
from tests.support.peers.real_models import CHAT, CHATTING, FILES, PROMPT, REFERENCES, TEXT

CONTEXT = 512
GREEDY, ANSWER = 100, 40
"""Tokens that continue the prompt, and tokens of the answer in a conversation."""


def token_ids(model: Any, text: str) -> list[int]:
    """The tokens of a text, with what the model puts in front."""
    raw, room = text.encode(), (llama_cpp.llama_token * CONTEXT)()
    vocab = llama_cpp.llama_model_get_vocab(model)
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), room, CONTEXT, True, False)
    assert count > 0
    return list(room[:count])


def decode(context: Any, ids: Sequence[int], start: int) -> npt.NDArray[np.float64]:
    """Logits (T, V) of tokens at the positions from `start` on."""
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_batch_free(batch)
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context)))
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ids), width)).astype(np.float64)


def greedy(path: Path, ids: Sequence[int], count: int) -> list[int]:
    """The most probable tokens behind a prompt, one after another."""
    with opened(path, CONTEXT) as (_, context):
        found = [int(decode(context, ids, 0)[-1].argmax())]
        while len(found) < count:
            found.append(int(decode(context, found[-1:], len(ids) + len(found) - 1)[-1].argmax()))
    return found


def mean_log_probability(path: Path, ids: Sequence[int]) -> float:
    """Of every token but the first, given those before it."""
    with opened(path, CONTEXT) as (_, context):
        logits = decode(context, ids, 0)[:-1]
    top = logits.max(-1)
    chosen = logits[np.arange(len(logits)), list(ids[1:])]
    return float((chosen - top - np.log(np.exp(logits - top[:, None]).sum(-1))).mean())


def references(source: Path) -> dict[str, Any]:
    """What the test compares with, of one file."""
    chat = []
    if source.name in CHATTING:
        with LLM(source, "cpu", context_length=CONTEXT) as llm:
            chat = llm.render_chat(CHAT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f32.gguf"
        with open_gguf(source) as gguf:
            rewrite(gguf, path, choose(gguf, GGMLType.F32, [])[0])
        with opened(path, CONTEXT) as (model, _):
            prompt, text = token_ids(model, PROMPT), token_ids(model, TEXT)
        return {
            "prompt": prompt,
            "greedy": greedy(path, prompt, GREEDY),
            "text": text,
            "mean_log_probability": mean_log_probability(path, text),
            "chat": chat,
            "answer": greedy(path, chat, ANSWER) if chat else [],
        }


def main() -> None:
    """Write the references of all files."""
    folder = Path(sys.argv[1])
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(lambda *_: None), ctypes.c_void_p(0))
    found = {name: references(folder / name) for name in FILES}
    REFERENCES.write_text(json.dumps({"version": VERSION, "models": found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
