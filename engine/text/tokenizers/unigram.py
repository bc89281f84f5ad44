"""Unigram: of all ways to spell a text in tokens, the most probable one, after SentencePiece's normalization.

The search is the `tokenizers` library's. The normalization is written here, because the library applies SentencePiece's
table character by character, and it was made for the longest match. Independent of metadata keys.
"""

import re
import struct
from collections.abc import Sequence

import numpy as np

from engine.errors import TokenizerError
from engine.text.tokenizers.special_tokens import TokenType
from engine.text.tokenizers.spm import SPACE


class Unigram:
    """Text → token ids by maximum likelihood (Kudo 2018).

    Args:
        tokens: V token strings, spaces written as "▁".
        types: V values of TokenType; control, unknown and byte tokens never match text.
        scores: float32 (V,) log-probabilities.
        unknown_id: what characters outside the vocabulary become; a run of them becomes one.
        charsmap: SentencePiece's `precompiled_charsmap`, b"" for none.
        add_space_prefix: put a space before the text.
        merge_spaces: make runs of spaces one, and drop those at the ends.

    Raises:
        TokenizerError: the table of characters is damaged, or the library refuses the vocabulary.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        types: Sequence[int],
        scores: np.ndarray,
        unknown_id: int | None,
        *,
        charsmap: bytes,
        add_space_prefix: bool,
        merge_spaces: bool,
    ) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import Unigram as Model

        if unknown_id is None:
            raise TokenizerError(
                "the vocabulary has no unknown token (tokenizer.ggml.unknown_token_id); Unigram needs one"
            )
        matching = {TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED}
        seen: set[str] = set()
        entries: list[tuple[str, float]] = []
        for id, (token, type, score) in enumerate(zip(tokens, types, scores.tolist(), strict=True)):
            if type in matching and token and token not in seen:
                seen.add(token)
                entries.append((token, 0.0 if type == TokenType.USER_DEFINED else score))
            else:
                entries.append((f"\uffff{id}\uffff", 0.0))  # a noncharacter, taken out of every text: never matches
        try:
            self._tokenizer = Tokenizer(Model(entries, unknown_id, False))
        except Exception as error:
            raise TokenizerError(f"the unigram vocabulary cannot be used: {error}") from error
        self._charsmap = CharacterMap(charsmap) if charsmap else None
        own = sorted((t for t, k in zip(tokens, types, strict=True) if k == TokenType.USER_DEFINED and t), key=len)
        self._own = re.compile("(" + "|".join(map(re.escape, reversed(own))) + ")") if own else None
        self._add_space_prefix = add_space_prefix
        self._merge_spaces = merge_spaces

    def encode(self, text: str) -> list[int]:
        """Token ids of text without special tokens; no lone surrogates."""
        ids: list[int] = self._tokenizer.encode(self.normalize(text), add_special_tokens=False).ids
        return ids

    def normalize(self, text: str) -> str:
        """The text that is searched: characters mapped, spaces merged and written as "▁"."""
        text = text.replace("\uffff", "\ufffd")
        if self._charsmap is not None:
            # User-defined tokens stay as they are written.
            parts = [text] if self._own is None else self._own.split(text)
            text = "".join(part if i % 2 else self._charsmap.apply(part) for i, part in enumerate(parts))
        if self._merge_spaces:
            text = "".join(" " + word for word in text.split(" ") if word)
        elif self._add_space_prefix and text:
            text = " " + text
        return text.replace(" ", SPACE)


class CharacterMap:
    """SentencePiece's table of replacements: at each place the longest key that matches is replaced.

    Layout of the table: uint32 size of the first part in bytes; a double array of uint32 units (Aoe 1989, in Darts'
    packing: label in bits 0-7, "has a value" bit 8, offset in bits 10-30, scaled by 256 if bit 9; in a value unit bits
    0-30 are the value); then the replacements, each ended by a zero byte. A value is an offset into them.

    Args:
        blob: the table.

    Raises:
        TokenizerError: the table is damaged.
    """

    def __init__(self, blob: bytes) -> None:
        size = struct.unpack_from("<I", blob)[0] if len(blob) >= 4 else 0
        if size % 4 or not 4 <= size < len(blob) - 4:
            raise TokenizerError(
                "tokenizer.ggml.precompiled_charsmap is damaged: its first part claims "
                f"{size} of {len(blob)} bytes; a multiple of 4 that leaves room for the rest was expected"
            )
        self._units: list[int] = np.frombuffer(blob, "<u4", size // 4, 4).tolist()
        self._replacements = blob[4 + size :]
        self._plain = self._plain_run()

    def apply(self, text: str) -> str:
        """The text with every longest match replaced."""
        pieces: list[str] = []
        place = 0
        while place < len(text):
            run = self._plain.match(text, place)
            if run is not None:
                pieces.append(run.group())
                place = run.end()
                continue
            length, value = self._longest(text, place)
            if length:
                pieces.append(self._replacement(value))
                place += length
            else:
                pieces.append(text[place])
                place += 1
        return "".join(pieces)

    def _offset(self, unit: int) -> int:
        return (unit >> 10) << ((unit & 0x200) >> 6)

    def _step(self, node: int, byte: int) -> tuple[int, int | None] | None:
        """The child of a node by one byte, with its value if a key ends there; None where no key goes on."""
        child = node ^ byte
        unit = self._unit(child)
        if unit & 0x800000FF != byte:
            return None
        below = child ^ self._offset(unit)
        return below, self._unit(below) & 0x7FFFFFFF if unit & 0x100 else None

    def _unit(self, index: int) -> int:
        if index >= len(self._units):
            raise TokenizerError("tokenizer.ggml.precompiled_charsmap is damaged: a link points outside the table")
        return self._units[index]

    def _longest(self, text: str, place: int) -> tuple[int, int]:
        """Characters and value of the longest key at a place; (0, 0) where there is none."""
        node, found = self._offset(self._units[0]), (0, 0)
        for count, character in enumerate(text[place : place + 32], 1):
            for byte in character.encode():
                step = self._step(node, byte) if byte else None
                if step is None:
                    return found
                node, value = step
            if value is not None:
                found = count, value
        return found

    def _replacement(self, value: int) -> str:
        end = self._replacements.find(b"\0", value)
        if end < 0:
            raise TokenizerError("tokenizer.ggml.precompiled_charsmap is damaged: a replacement has no end")
        return self._replacements[value:end].decode("utf-8", "replace")

    def _plain_run(self) -> re.Pattern[str]:
        """Matches ASCII that no key can touch: no key is made of ASCII alone from there on, and ASCII follows."""
        root = self._offset(self._units[0])
        plain = []
        for byte in range(1, 128):
            step = self._step(root, byte)
            if step is None or (step[1] is None and not any(self._step(step[0], after) for after in range(1, 128))):
                plain.append(re.escape(chr(byte)))
        return re.compile(f"(?:[{''.join(plain)}](?=[\\x00-\\x7f]|\\Z))+" if plain else r"(?!)")
