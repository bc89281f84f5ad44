"""Which tokens are special: names that end a generation, names whose type a file often gets wrong, and id look-up.

GGUF files mark control tokens by type and name a few ids in metadata; many files are incomplete. The rules here follow
llama.cpp so that a model stops at the same place. Independent of encoding.
"""

import logging
from collections.abc import Mapping
from enum import IntEnum
from numbers import Integral
from typing import Any

import numpy as np

from engine.errors import TokenizerError

logger = logging.getLogger(__name__)


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Tokens of these names end a generation, whatever the file says of their type.
END_NAMES = frozenset(
    {
        "</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>",
        "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>",
        "<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[", "<|ifm|im_end|>",
    }
)  # fmt: skip

# Fill-in-the-middle tokens by role, for files whose metadata does not name them.
FIM_NAMES: dict[str, tuple[str, ...]] = {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                "<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                "<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                "<|code_middle|>", "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip

# These three also end a generation: after them comes another file, not an answer.
_ENDING_FIM_ROLES = ("fim_pad", "fim_rep", "fim_sep")

# The metadata key of each role; the first key present counts.
_ID_KEYS: dict[str, tuple[str, ...]] = {
    "bos": ("tokenizer.ggml.bos_token_id",),
    "eos": ("tokenizer.ggml.eos_token_id",),
    "eot": ("tokenizer.ggml.eot_token_id",),
    "eom": ("tokenizer.ggml.eom_token_id",),
    "unk": ("tokenizer.ggml.unknown_token_id",),
    "sep": ("tokenizer.ggml.seperator_token_id", "tokenizer.ggml.separator_token_id"),
    "pad": ("tokenizer.ggml.padding_token_id",),
    "mask": ("tokenizer.ggml.mask_token_id",),
    "fim_pre": ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id"),
    "fim_suf": ("tokenizer.ggml.fim_suf_token_id", "tokenizer.ggml.suffix_token_id"),
    "fim_mid": ("tokenizer.ggml.fim_mid_token_id", "tokenizer.ggml.middle_token_id"),
    "fim_pad": ("tokenizer.ggml.fim_pad_token_id",),
    "fim_rep": ("tokenizer.ggml.fim_rep_token_id",),
    "fim_sep": ("tokenizer.ggml.fim_sep_token_id",),
}

# Tokens of the harmony format that must stay visible in the answer: they carry its structure.
_ALWAYS_VISIBLE = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def special_ids(metadata: Mapping[str, Any], n_tokens: int, defaults: Mapping[str, int]) -> dict[str, int]:
    """Token id of each role the file names, else the default of its vocabulary kind where that is in range.

    An id outside the vocabulary is passed over with a warning, because published files have such padding ids.

    Raises:
        TokenizerError: a value is not an integer.
    """
    ids = {role: id for role, id in defaults.items() if id < n_tokens}
    for role, keys in _ID_KEYS.items():
        for key in keys:
            value = metadata.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TokenizerError(f"{key} is {value!r}; it must be a token id from 0 to {n_tokens - 1}")
            if 0 <= int(value) < n_tokens:
                ids[role] = int(value)
                break
            logger.warning("%s is %d, outside the vocabulary of %d tokens: ignored", key, int(value), n_tokens)
    return ids


def listed_ends(metadata: Mapping[str, Any], n_tokens: int) -> frozenset[int]:
    """Ids of end tokens beside the one of its own key, as files made for Ollama list them.

    Raises:
        TokenizerError: they are no list of integers.
    """
    key = "tokenizer.ggml.eos_token_ids"
    listed = metadata.get(key, [])
    ids = listed.tolist() if isinstance(listed, np.ndarray) else listed
    if not isinstance(ids, list) or not all(isinstance(id, int) for id in ids):
        raise TokenizerError(f"{key} is {str(ids)[:60]}; it must be a list of token ids from 0 to {n_tokens - 1}")
    return frozenset(id for id in ids if 0 <= id < n_tokens)


def end_of_generation(
    ids: dict[str, int], token_to_id: Mapping[str, int], types: list[int], tokens: list[str]
) -> frozenset[int]:
    """Ids that end a generation; corrects `types` and adds the roles found by name to `ids`, both in place."""
    for role, names in FIM_NAMES.items():
        if role not in ids:
            found = next((token_to_id[name] for name in names if name in token_to_id), None)
            if found is not None:
                ids[role] = found
                types[found] = TokenType.CONTROL
    ends = {ids[role] for role in (*_ENDING_FIM_ROLES, "eos", "eot", "eom") if role in ids}
    for name in END_NAMES:
        if name in token_to_id:
            ends.add(token_to_id[name])
            types[token_to_id[name]] = TokenType.CONTROL
    for name in _ALWAYS_VISIBLE:
        if name in token_to_id:
            types[token_to_id[name]] = TokenType.USER_DEFINED

    # Two families give a common end name another meaning; their other end tokens distinguish them.
    end_names = {tokens[id] for id in ends}
    calls = bool(end_names & {"<|call|>", "<|calls|>"})
    if (
        "<|end|>" in end_names and calls and end_names & {"<|return|>", "<|flush|>"}
    ):  # harmony: one message ends, not the turn
        ends.discard(token_to_id["<|end|>"])
        types[token_to_id["<|end|>"]] = TokenType.USER_DEFINED
    if {"<|tool_response>", "</s>"} <= end_names:
        # Gemma 4: </s> is an HTML tag
        ends.discard(token_to_id["</s>"])
        types[token_to_id["</s>"]] = TokenType.NORMAL
    return frozenset(ends)
