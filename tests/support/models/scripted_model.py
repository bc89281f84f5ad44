"""A model of one layer that says what it is told: every token is followed by a fixed one, attention adds nothing."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.models.gguf_builder import MERGES, build_gguf, byte_tokens

END = "<|im_end|>"


def spelled(text: str) -> str:
    """Text in the characters of GPT-2's byte-level vocabularies."""
    letters = byte_tokens()
    return "".join(letters[byte] for byte in text.encode())


def scripted_llama(
    path: Path,
    answer: Sequence[str],
    *,
    control: Sequence[str] = (),
    template: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    endless: bool = False,
    own: bool = False,
) -> Path:
    """Writes a llama whose answer to every prompt is `answer`, then END, or the same again and again.

    Args:
        path: of the file.
        answer: texts of its tokens, each once; a token of its own is made for each.
        control: names of control tokens, some of which may be in the answer; END is one of them.
        template: its chat template.
        metadata: more of it.
        endless: its answers end with the context alone.
        own: the tokens of the answer are those that a text with their words is cut into, whatever is around them.
    """
    names = [*dict.fromkeys([*control, END])]
    words = [piece for piece in answer if piece not in names]
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = byte_tokens() + merged + [f"{spelled(word)}" for word in words] + names
    types = [1] * (len(tokens) - len(names)) + [3] * len(names)
    if own:
        types[len(tokens) - len(names) - len(words) : len(tokens) - len(names)] = [4] * len(words)
        tokens[len(tokens) - len(names) - len(words) : len(tokens) - len(names)] = words
    ids = {name: index for index, name in enumerate(tokens)}
    script = [ids[piece if piece in names or own else spelled(piece)] for piece in answer]
    script.append(script[0] if endless else ids[END])
    following = dict.fromkeys(range(len(tokens)), script[0]) | dict(pairwise(script))
    width = -(-len(tokens) // 32) * 32
    embed = np.zeros((len(tokens), width), np.float32)
    embed[np.arange(len(tokens)), np.arange(len(tokens))] = 1
    output = np.zeros_like(embed)
    for token, after in following.items():
        output[after, token] = 10
    values = {
        "general.architecture": "llama",
        "llama.context_length": 2048,
        "llama.embedding_length": width,
        "llama.block_count": 1,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 1,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": ids[END],
        "tokenizer.ggml.add_bos_token": False,
    }
    if template is not None:
        values["tokenizer.chat_template"] = template
    shapes = {
        "attn_q": (32, width), "attn_k": (32, width), "attn_v": (32, width), "attn_output": (width, 32),
        "ffn_gate": (32, width), "ffn_up": (32, width), "ffn_down": (width, 32),
    }  # fmt: skip
    tensors = {"token_embd.weight": embed, "output.weight": output, "output_norm.weight": np.ones(width, np.float32)}
    tensors |= {f"blk.0.{name}.weight": np.ones(width, np.float32) for name in ("attn_norm", "ffn_norm")}
    tensors |= {f"blk.0.{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    path.write_bytes(build_gguf(values | dict(metadata or {}), tensors))
    return path


def in_pieces(text: str, control: Sequence[str] = (), size: int = 4) -> list[str]:
    """A text cut into tokens for a script: control tokens as such, else pieces of a size or longer, each once."""
    pieces: list[str] = []
    rest, piece = text, ""
    while rest:
        name = next((name for name in control if rest.startswith(name)), None)
        if name is not None and not piece:
            assert name not in pieces, f"a script has each token once; {name} comes twice"
            pieces.append(name)
            rest = rest[len(name) :]
            continue
        if name is None:
            piece, rest = piece + rest[0], rest[1:]
        left = next((rest.index(name) for name in control if name in rest), len(rest))
        ends = name is not None or not rest
        if ends or (len(piece) >= size and piece not in pieces and left >= size):
            assert piece not in pieces, f"a script has each token once; {piece!r} comes twice"
            pieces.append(piece)
            piece = ""
    return pieces
