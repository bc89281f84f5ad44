"""Chooses the algorithm of a vocabulary kind and what the file's flags change in it.

One function a kind; the tokenizer uses the `Encoding` that it returns.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np

from engine.errors import TokenizerError
from engine.text.tokenizers.bpe import BYTE_OF_CHARACTER, ByteLevelBpe, CharacterBpe
from engine.text.tokenizers.longest_match import BestSpelling, LongestMatch, unescape
from engine.text.tokenizers.pretokenizers import PreTokenizer, pre_tokenizer
from engine.text.tokenizers.spm import SentencePieceBpe
from engine.text.tokenizers.unigram import Unigram
from engine.text.tokenizers.vocabulary import Vocabulary, flag, string_list
from engine.text.tokenizers.wordpiece import WordPiece

logger = logging.getLogger(__name__)

_MERGES = "tokenizer.ggml.merges"


class Spelling(Enum):
    """How tokens are written in the file."""

    BYTE_ALPHABET = "byte alphabet"  # one printable character a byte, as GPT-2 does
    ESCAPED_SPACES = "escaped spaces"  # "▁" replaces a space
    PLAIN = "plain"  # as they are
    BACKSLASHES = "backslashes"  # bytes, with \n, \x0a and the like


class Encoder(Protocol):
    """Turns text without special tokens into token ids."""

    def encode(self, text: str) -> list[int]:
        """Token ids of text that holds no lone surrogates."""


@dataclass(frozen=True)
class Encoding:
    """An algorithm and what surrounds it.

    Attributes:
        encoder: the algorithm.
        spelling: how tokens are written.
        pre: name of the pre-tokenizer; None for kinds that have none.
        add_bos: a text begins with BOS unless the file says otherwise.
        add_eos: it ends with EOS.
        add_sep: SEP goes between two texts.
        sep_last: a single text ends with SEP as well.
        space_first: a space goes before text at the start and after each special token.
        escape_spaces: the encoder takes spaces written as "▁".
        drop_space: the first space of decoded text is not part of it.
        keeps_all: every character of a text is part of some token; other algorithms may leave some out or join them.
    """

    encoder: Encoder
    spelling: Spelling
    pre: str | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_sep: bool = False
    sep_last: bool = False
    space_first: bool = False
    escape_spaces: bool = False
    drop_space: bool = False
    keeps_all: bool = False


def build_encoding(vocabulary: Vocabulary, metadata: Mapping[str, Any], pre: str | None) -> Encoding:
    """The encoding of a vocabulary.

    Args:
        vocabulary: the checked vocabulary.
        metadata: the file's metadata, for merges, flags and the pre-tokenizer's name.
        pre: name of a pre-tokenizer to use instead of the file's.

    Raises:
        TokenizerError: what the kind needs is missing or malformed.
    """
    match vocabulary.kind:
        case "llama":
            return _sentencepiece(vocabulary, metadata)
        case "bert":
            return _wordpiece(vocabulary, metadata)
        case "t5":
            return _unigram(vocabulary, metadata)
        case "rwkv":
            pieces, unknown = [unescape(token) for token in vocabulary.tokens], vocabulary.ids.get("unk")
            return Encoding(LongestMatch(pieces, unknown), Spelling.BACKSLASHES, keeps_all=unknown is not None)
        case "plamo2":
            byte_ids = _byte_ids(vocabulary)
            encoder = BestSpelling(vocabulary.tokens, vocabulary.types, _scores(vocabulary), byte_ids)
            return Encoding(encoder, Spelling.PLAIN)
        case _:
            return _bpe(vocabulary, metadata, pre)


def _bpe(vocabulary: Vocabulary, metadata: Mapping[str, Any], pre: str | None) -> Encoding:
    name = pre or (vocabulary.kind if vocabulary.kind in ("gemma4", "whitespace") else _pre_name(metadata))
    style = pre_tokenizer(name)
    # Kimi K2's words are tokens by rank alone; its files may have no merges.
    merges = [] if name == "kimi-k2" and metadata.get(_MERGES) is None else string_list(metadata, _MERGES)
    if style.byte_level:
        encoder: Encoder = ByteLevelBpe(vocabulary.token_to_id, merges, style)
        separated = name in ("jina-v1-en", "jina-v2-code", "roberta-bpe")
        return Encoding(
            encoder,
            Spelling.BYTE_ALPHABET,
            pre=name,
            add_bos=style.add_bos,
            add_sep=separated,
            keeps_all=BYTE_OF_CHARACTER.keys() <= vocabulary.token_to_id.keys(),
        )
    return _character_bpe(vocabulary, metadata, merges, name, style)


def _character_bpe(
    vocabulary: Vocabulary, metadata: Mapping[str, Any], merges: list[str], name: str, style: PreTokenizer
) -> Encoding:
    lowercase = name == "whitespace" and flag(metadata, "tokenizer.ggml.normalizer.lowercase", False)
    return Encoding(
        CharacterBpe(vocabulary.token_to_id, merges, style, lowercase=lowercase),
        Spelling.ESCAPED_SPACES if style.escape_spaces else Spelling.PLAIN,
        pre=name,
        add_bos=style.add_bos,
        escape_spaces=style.escape_spaces,
    )


def _sentencepiece(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Encoding:
    space_first = flag(metadata, "tokenizer.ggml.add_space_prefix", True)
    encoder = SentencePieceBpe(
        vocabulary.token_to_id, _scores(vocabulary), _byte_ids(vocabulary), vocabulary.ids.get("unk")
    )
    return Encoding(
        encoder,
        Spelling.ESCAPED_SPACES,
        add_bos=True,
        space_first=space_first,
        escape_spaces=True,
        drop_space=space_first,
        keeps_all=True,
    )


def _wordpiece(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Encoding:
    lowercase = flag(metadata, "tokenizer.ggml.normalizer.lowercase", True)
    strip_accents = flag(metadata, "tokenizer.ggml.normalizer.strip_accents", lowercase)
    encoder = WordPiece(
        vocabulary.token_to_id, vocabulary.ids.get("unk"), lowercase=lowercase, strip_accents=strip_accents
    )
    return Encoding(encoder, Spelling.ESCAPED_SPACES, add_bos=True, add_sep=True, sep_last=True, drop_space=True)


def _unigram(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Encoding:
    add_space_prefix = flag(metadata, "tokenizer.ggml.add_space_prefix", False)
    merge_spaces = flag(metadata, "tokenizer.ggml.remove_extra_whitespaces", False)
    encoder = Unigram(
        vocabulary.tokens,
        vocabulary.types,
        _scores(vocabulary),
        vocabulary.ids.get("unk"),
        charsmap=_charsmap(metadata),
        add_space_prefix=add_space_prefix,
        merge_spaces=merge_spaces,
    )
    return Encoding(encoder, Spelling.ESCAPED_SPACES, add_eos=True, drop_space=add_space_prefix or merge_spaces)


def _pre_name(metadata: Mapping[str, Any]) -> str:
    name = metadata.get("tokenizer.ggml.pre")
    if name is not None and not isinstance(name, str):
        raise TokenizerError(f"tokenizer.ggml.pre must be a string, found {type(name).__name__}")
    if not name:
        logger.warning(
            "the file names no pre-tokenizer; words are cut by llama.cpp's old default, which may cost quality"
        )
        return "default"
    return name


def _scores(vocabulary: Vocabulary) -> np.ndarray:
    return np.zeros(len(vocabulary.tokens), np.float32) if vocabulary.scores is None else vocabulary.scores


def _byte_ids(vocabulary: Vocabulary) -> list[int | None]:
    """Id of the token of each byte: `<0x0A>`, or the ASCII character itself."""
    ids = vocabulary.token_to_id
    return [ids.get(f"<0x{byte:02X}>", ids.get(chr(byte)) if byte < 0x80 else None) for byte in range(256)]


def _charsmap(metadata: Mapping[str, Any]) -> bytes:
    key = "tokenizer.ggml.precompiled_charsmap"
    value = metadata.get(key)
    if value is None:
        return b""
    if not isinstance(value, np.ndarray) or value.dtype.itemsize != 1 or value.ndim != 1:
        raise TokenizerError(f"{key} must be an array of bytes, found {type(value).__name__}")
    return value.tobytes()
