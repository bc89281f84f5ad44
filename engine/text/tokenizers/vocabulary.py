"""Reads a vocabulary out of GGUF metadata and checks it: tokens, types, scores, special ids, flags.

Nothing in the metadata is trusted. `encoding.py` makes an encoder of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import TokenizerError
from engine.text.tokenizers.special_tokens import TokenType, end_of_generation, listed_ends, special_ids

KINDS = {
    "gpt2": "byte-level BPE",
    "llama": "SentencePiece BPE",
    "bert": "WordPiece",
    "t5": "Unigram",
    "gemma4": "BPE over characters",
    "whitespace": "BPE over characters",
    "rwkv": "longest match",
    "plamo2": "best spelling",
}

# Where the file names no ids: what SentencePiece, BERT, T5 and PLaMo 2 put there.
_SPECIAL = frozenset({int(TokenType.CONTROL), int(TokenType.UNKNOWN)})
_DEFAULT_IDS = {
    "llama": {"unk": 0, "bos": 1, "eos": 2},
    "bert": {"pad": 0, "unk": 100, "bos": 101, "sep": 102, "mask": 103},
    "t5": {"pad": 0, "eos": 1, "unk": 2},
    "plamo2": {"unk": 0, "bos": 1, "eos": 2, "pad": 3},
}


@dataclass(frozen=True)
class Vocabulary:
    """A checked vocabulary of V tokens.

    Attributes:
        kind: a key of KINDS, the value of tokenizer.ggml.model.
        tokens: V strings as the file has them.
        types: V values of TokenType, corrected for names that are known to be special.
        scores: float32 (V,), or None where the file has none.
        token_to_id: the first id of each non-empty string.
        ids: token id by role ("bos", "eos", "eot", "pad", "fim_pre" …), only roles that exist.
        eog_ids: ids that end a generation.
    """

    kind: str
    tokens: list[str]
    types: list[int]
    scores: np.ndarray | None
    token_to_id: dict[str, int]
    ids: dict[str, int]
    eog_ids: frozenset[int]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Vocabulary":
        """Reads and checks the `tokenizer.ggml.*` keys.

        Raises:
            TokenizerError: there is no vocabulary, its kind is unknown, or a key is malformed.
        """
        kind = _kind(metadata)
        tokens = string_list(metadata, "tokenizer.ggml.tokens")
        if not tokens:
            raise TokenizerError("tokenizer.ggml.tokens is empty; a vocabulary needs at least one token")
        types = _types(metadata, len(tokens))
        token_to_id = dict(zip(reversed(tokens), range(len(tokens) - 1, -1, -1), strict=True))
        token_to_id.pop("", None)
        ids = special_ids(metadata, len(tokens), _DEFAULT_IDS.get(kind, {}))
        eog_ids = end_of_generation(ids, token_to_id, types, tokens) | listed_ends(metadata, len(tokens))
        return cls(kind, tokens, types, _scores(metadata, len(tokens)), token_to_id, ids, eog_ids)

    def is_special(self, id: int) -> bool:
        """True for control and unknown tokens: they control the model and are no part of the text."""
        return self.types[id] in _SPECIAL


def string_list(metadata: Mapping[str, Any], key: str) -> list[str]:
    """The list of strings under `key`; TokenizerError if it is missing or holds anything else."""
    value = metadata.get(key)
    if value is None:
        raise TokenizerError(f"the file has no {key}; its tokenizer cannot be built without")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TokenizerError(f"{key} must be a list of strings, found {_describe(value)}")
    try:
        "".join(value).encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"{key} holds a string that is not valid Unicode: {error.reason}") from None
    return value


def flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    """The boolean under `key`, or the default where it is missing; TokenizerError if it is something else."""
    value = metadata.get(key)
    if value is None:
        return default
    if not isinstance(value, (bool, np.bool_)):
        raise TokenizerError(f"{key} must be true or false, found {_describe(value)}")
    return bool(value)


def _kind(metadata: Mapping[str, Any]) -> str:
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or (isinstance(kind, str) and kind in ("none", "no_vocab")):
        raise TokenizerError(
            f"the file has no tokenizer (tokenizer.ggml.model is {kind!r}): give prompts as lists of token ids"
        )
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(f"{name!r} ({what})" for name, what in KINDS.items())
        raise TokenizerError(
            f"tokenizer.ggml.model is {kind!r}; supported are {known}. Prompts as lists of token ids still work"
        )
    return kind


def _types(metadata: Mapping[str, Any], n_tokens: int) -> list[int]:
    key = "tokenizer.ggml.token_type"
    if metadata.get(key) is None:
        return [int(TokenType.NORMAL)] * n_tokens
    values = _numbers(metadata[key], key, n_tokens)
    if values.dtype.kind not in "iu":
        raise TokenizerError(f"{key} must hold integers, found {values.dtype}")
    known = (values >= 0) & (values <= max(TokenType))
    types: list[int] = np.where(known, values, int(TokenType.UNDEFINED)).tolist()
    return types


def _scores(metadata: Mapping[str, Any], n_tokens: int) -> np.ndarray | None:
    key = "tokenizer.ggml.scores"
    if metadata.get(key) is None:
        return None
    scores = _numbers(metadata[key], key, n_tokens).astype(np.float32)
    if np.isnan(scores).any():
        raise TokenizerError(f"{key} holds NaN at token {int(np.flatnonzero(np.isnan(scores))[0])}; scores are numbers")
    return scores


def _numbers(value: Any, key: str, n_tokens: int) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        array = np.asarray(None)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise TokenizerError(f"{key} must be a list of numbers, found {_describe(value)}")
    if len(array) < n_tokens:
        raise TokenizerError(f"{key} has {len(array)} entries for {n_tokens} tokens; it needs one per token")
    return array[:n_tokens]


def _describe(value: Any) -> str:
    if isinstance(value, list):
        odd = next((i for i, item in enumerate(value) if not isinstance(item, str)), None)
        return "a list" if odd is None else f"{type(value[odd]).__name__} at index {odd}"
    return type(value).__name__
