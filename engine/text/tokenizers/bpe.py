"""BPE through the `tokenizers` library: words by the pre-tokenizer's patterns, then merges in file order.

Source of the byte alphabet: GPT-2 (Radford et al. 2019), where each of the 256 bytes is written as one printable
character. Independent of special tokens and metadata keys.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from engine.errors import TokenizerError
from engine.text.tokenizers.pretokenizers import PreTokenizer

logger = logging.getLogger(__name__)

# The library works fastest on pieces of this many characters (measured: 1 MB in 0.4 s, as one piece in 0.9 s).
_CHUNK = 50_000
# Of a longer piece the interpreter lock is released, so that other threads go on: see ByteLevelBpe._ids.
_BRIEF = 2_000
# Text without any safe place to cut is cut here all the same: the library's regex engine fails on longer runs.
_HARD_CHUNK = 1_000_000
# Every pattern of the table starts a word at a space between ASCII letters, and at a letter after a single line break.
_SAFE_CUT = re.compile(r"(?<=[a-z])(?= [A-Za-z])|(?<=\S\n)(?=[A-Za-z\u4e00-\u9fa5])")


def _byte_alphabet() -> dict[str, int]:
    """Printable character → byte value: itself where it is printable Latin-1, else 256, 257, … in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
_SPACE = next(character for character, byte in BYTE_OF_CHARACTER.items() if byte == 0x20)


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a character outside the alphabet gives its own UTF-8."""
    plain = token.replace(_SPACE, " ")
    if plain.isascii():  # most tokens, in half the time
        return plain.encode()
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return b"".join(
            bytes([BYTE_OF_CHARACTER[character]]) if character in BYTE_OF_CHARACTER else character.encode()
            for character in token
        )


class ByteLevelBpe:
    """Text → token ids by byte-level BPE.

    Args:
        token_to_id: V token strings in the byte alphabet.
        merges: "left right" strings, highest priority first.
        style: how text is cut into words.

    Raises:
        TokenizerError: no merge of a non-empty list fits the vocabulary, or the library refuses the vocabulary.
    """

    def __init__(self, token_to_id: Mapping[str, int], merges: list[str], style: PreTokenizer) -> None:
        from tokenizers import Regex, Tokenizer, pre_tokenizers

        self._style = style
        self._tokenizer = Tokenizer(_model(dict(token_to_id), merges, style.ignore_merges))
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in style.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])

    def encode(self, text: str) -> list[int]:
        """Token ids of text that holds no special tokens and no lone surrogates."""
        ids: list[int] = []
        for chunk in _chunks(text, self._style.border_at_space):
            ids.extend(self._ids(chunk))
        return ids

    def _ids(self, chunk: str) -> list[int]:
        if len(chunk) <= _BRIEF:
            found = self._tokenizer.encode(chunk, add_special_tokens=False)
        else:
            # The library's call for one text holds the interpreter lock: 0.1 s for usual text, 5 s for a million
            # characters without a safe cut. That for several texts does not, but its first use starts threads.
            (found,) = self._tokenizer.encode_batch_fast([chunk], add_special_tokens=False)
        ids: list[int] = found.ids
        return ids


class CharacterBpe:
    """Text → token ids by BPE over characters, for vocabularies that are not written in the byte alphabet.

    A character that is no token becomes the tokens of its bytes (`<0x0A>`). What the style's pattern does not match is
    dropped.

    Args:
        token_to_id: V token strings.
        merges: "left right" strings, highest priority first.
        style: how text is cut into words; one pattern that Python's `re` understands.
        lowercase: fold letters to lower case.

    Raises:
        TokenizerError: see ByteLevelBpe.
    """

    def __init__(
        self, token_to_id: Mapping[str, int], merges: list[str], style: PreTokenizer, *, lowercase: bool = False
    ) -> None:
        from tokenizers import Tokenizer

        (pattern,) = style.patterns
        self._token_to_id = token_to_id
        self._tokenizer = Tokenizer(_model(dict(token_to_id), merges, style.ignore_merges, byte_fallback=True))
        self._words = re.compile(pattern)
        self._lowercase = lowercase
        self._whole_breaks = style.whole_breaks

    def encode(self, text: str) -> list[int]:
        """Token ids of text that holds no special tokens and no lone surrogates."""
        ids: list[int] = []
        for match in self._words.finditer(text.lower() if self._lowercase else text):
            word = match.group()
            whole = self._token_to_id.get(word) if self._whole_breaks and word[0] == "\n" else None
            ids.extend([whole] if whole is not None else self._tokenizer.encode(word, add_special_tokens=False).ids)
        return ids


def _model(token_to_id: dict[str, int], merges: list[str], ignore_merges: bool, *, byte_fallback: bool = False) -> Any:
    """The library's BPE model; merges that cannot apply are left out, the first of equal merges counts."""
    from tokenizers.models import BPE

    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    # The library fails on a merge that makes more than the longest token, so the joins are looked up first.
    well_formed = len(set(pairs)) == len(pairs) and all(len(pair) == 2 for pair in pairs)
    if well_formed and all(map(token_to_id.__contains__, map("".join, pairs))):
        try:
            return BPE(token_to_id, pairs, ignore_merges=ignore_merges, byte_fallback=byte_fallback)
        except Exception as error:
            logger.debug("merges need sorting out: %s", error)
    usable = [pair for pair in dict.fromkeys(pairs) if _fits(pair, token_to_id)]
    if merges and not usable:
        raise TokenizerError(
            f"none of the {len(merges)} entries of tokenizer.ggml.merges fits the vocabulary, the first is "
            f'{merges[0][:80]!r}; an entry is two tokens with a space between ("Ġ t"), and so is what they make ("Ġt")'
        )
    if len(usable) < len(merges):
        logger.warning(
            "%d of %d merges do not fit the vocabulary or repeat: ignored", len(merges) - len(usable), len(merges)
        )
    try:
        return BPE(token_to_id, usable, ignore_merges=ignore_merges, byte_fallback=byte_fallback)
    except Exception as error:
        raise TokenizerError(f"the vocabulary and its merges cannot be used: {error}") from error


def _fits(pair: tuple[str, ...], token_to_id: Mapping[str, int]) -> bool:
    return len(pair) == 2 and all(pair) and all(part in token_to_id for part in (*pair, "".join(pair)))


def _chunks(text: str, may_cut: bool) -> Iterator[str]:
    """Cuts long text where a word starts in any case; only a run of a million characters is cut elsewhere."""
    start = 0
    while len(text) - start > _CHUNK:
        cut = _SAFE_CUT.search(text, start + _CHUNK, start + _HARD_CHUNK) if may_cut else None
        end = cut.start() if cut else min(len(text), start + _HARD_CHUNK)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
