"""Small hand-made vocabularies: byte-level BPE and SentencePiece."""

import numpy as np

from engine.text import Tokenizer
from engine.text.tokenizers.bpe import BYTE_OF_CHARACTER

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def bpe_metadata(merges=("Ġ t", "h e", "Ġt he"), specials=("<|endoftext|>", "<|im_end|>"), user=("<tool>",), **keys):
    """256 byte tokens, one token per merge, then control and user-defined tokens."""
    tokens = [*sorted(BYTE_OF_CHARACTER), *("".join(merge.split(" ")) for merge in merges)]
    n_normal = len(tokens)
    tokens += [*specials, *user]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([NORMAL] * n_normal + [CONTROL] * len(specials) + [USER] * len(user)),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.eos_token_id": n_normal,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


SPM_PIECES = (
    ("▁", -1.0), ("a", -2.0), ("b", -3.0), ("c", -4.0), ("▁a", -0.5), ("ab", -0.2), ("bc", -0.1), ("abc", -5.0),
    ("▁▁", -0.9), ("é", -6.0), ("aa", -0.2), ("ca", -0.2),
)  # fmt: skip


def spm_metadata(pieces=SPM_PIECES, user=("<|u|>",), **keys):
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*head, *(piece for piece, _ in pieces), *user]
    scores = [0.0] * len(head) + [score for _, score in pieces] + [0.0] * len(user)
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces) + [USER] * len(user)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


BPE = Tokenizer.from_metadata(bpe_metadata())
SPM = Tokenizer.from_metadata(spm_metadata())
SPM_PLAIN = Tokenizer.from_metadata(spm_metadata(add_space_prefix=False, add_bos_token=False))
