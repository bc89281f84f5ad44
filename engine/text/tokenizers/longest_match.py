"""Two tokenizers without merges: RWKV's greedy longest match over bytes, and PLaMo 2's best-scored spelling.

Independent of special tokens and metadata keys.
"""

from collections.abc import Sequence

import numpy as np

from engine.errors import TokenizerError
from engine.text.tokenizers.special_tokens import TokenType

_ESCAPES = {"t": 9, "n": 10, "r": 13}


def unescape(token: str) -> bytes:
    r"""The bytes of an RWKV token, which a GGUF file writes with \t, \n, \r, \xHH and a backslash before others."""
    data = bytearray()
    rest = iter(token)
    for character in rest:
        if character != "\\":
            data += character.encode()
            continue
        escaped = next(rest, "\\")
        if escaped == "x":
            digits = next(rest, "") + next(rest, "")
            try:
                data.append(int(digits, 16))
            except ValueError:
                raise TokenizerError(f"the token {token[:80]!r} has a broken escape \\x{digits}") from None
        elif escaped in _ESCAPES:
            data.append(_ESCAPES[escaped])
        else:
            data += escaped.encode()
    return bytes(data)


class LongestMatch:
    """Text → token ids: at each byte the longest token that matches (RWKV "World").

    Args:
        pieces: bytes of each token by id; empty ones never match.
        unknown_id: what a byte becomes that no token begins with; None leaves it out.
    """

    def __init__(self, pieces: Sequence[bytes], unknown_id: int | None) -> None:
        self._ids: dict[bytes, int] = {}
        for id, piece in enumerate(pieces):
            self._ids.setdefault(piece, id)
        self._ids.pop(b"", None)
        self._unknown_id = unknown_id
        # Lengths that occur for each first byte, longest first: few look-ups for a place.
        lengths: list[set[int]] = [set() for _ in range(256)]
        for piece in self._ids:
            lengths[piece[0]].add(len(piece))
        self._lengths = [sorted(found, reverse=True) for found in lengths]

    def encode(self, text: str) -> list[int]:
        """Token ids of text without special tokens; no lone surrogates."""
        data = text.encode()
        ids: list[int] = []
        place = 0
        while place < len(data):
            for length in self._lengths[data[place]]:
                id = self._ids.get(data[place : place + length])
                if id is not None:
                    ids.append(id)
                    place += length
                    break
            else:
                if self._unknown_id is not None:
                    ids.append(self._unknown_id)
                place += 1
        return ids


class BestSpelling:
    """Text → token ids: the spelling with the largest sum of scores, bytes where no token fits (PLaMo 2).

    Scores count in ten-thousandths, so that sums are exact; of equal spellings the one with the longer first token.

    Args:
        tokens: V token strings.
        types: V values of TokenType.
        scores: float32 (V,).
        byte_ids: id of the token of each of the 256 bytes.
    """

    _UNKNOWN = -10_000_000  # score of a character spelled in bytes
    _LEAST = -20_000_000  # tokens with no better score never match

    def __init__(
        self, tokens: Sequence[str], types: Sequence[int], scores: np.ndarray, byte_ids: Sequence[int | None]
    ) -> None:
        missing = [byte for byte, id in enumerate(byte_ids) if id is None]
        if missing:
            raise TokenizerError(f"the vocabulary has no token for byte 0x{missing[0]:02X} (<0x{missing[0]:02X}>)")
        self._byte_ids = byte_ids
        self._tokens: dict[str, tuple[int, int]] = {}
        with np.errstate(invalid="ignore", over="ignore"):
            exact = scores.astype(np.float64) * 1e4
            rounded = np.copysign(np.floor(np.abs(exact) + 0.5), exact)
        for id, (token, type, score) in enumerate(zip(tokens, types, rounded.tolist(), strict=True)):
            if type != TokenType.BYTE and token and self._LEAST < score < 2**31:
                self._tokens[token] = id, int(score)
        found: dict[str, set[int]] = {}
        for token in self._tokens:
            found.setdefault(token[0], set()).add(len(token))
        self._lengths = {character: sorted(lengths, reverse=True) for character, lengths in found.items()}

    def encode(self, text: str) -> list[int]:
        """Token ids of text without special tokens; no lone surrogates."""
        text = text.removeprefix("\ufeff")
        best = [0] * (len(text) + 1)
        # (characters, token id) of the best first token of the text from each place on; id -1 = spelled in bytes.
        first: list[tuple[int, int]] = [(1, -1)] * len(text)
        for place in range(len(text) - 1, -1, -1):
            top: int | None = None
            for length in self._lengths.get(text[place], ()):
                entry = self._tokens.get(text[place : place + length])
                if entry is None or place + length > len(text):
                    continue
                total = best[place + length] + entry[1]
                if top is None or total > top:
                    top, first[place] = total, (length, entry[0])
            unknown = best[place + 1] + self._UNKNOWN
            if top is None or unknown > top:
                top, first[place] = unknown, (1, -1)
            best[place] = top
        ids: list[int] = []
        place = 0
        while place < len(text):
            length, id = first[place]
            if id < 0:
                ids.extend(self._byte_ids[byte] for byte in text[place].encode())  # type: ignore[misc]
            else:
                ids.append(id)
            place += length
        return ids
