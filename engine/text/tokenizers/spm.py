"""SentencePiece BPE: characters merge pairwise, the best-scored token first, as far as the vocabulary goes.

The algorithm is SentencePiece's (Kudo and Richardson 2018) in the order llama.cpp runs it: of all neighbours whose join
is a token, the one with the highest score merges, the leftmost of equals. Scores may tie and any token may come from
any split, which a list of ranked merges cannot express; hence no `tokenizers` here. Independent of
special tokens and metadata keys.
"""

import heapq
from collections.abc import Mapping

import numpy as np

from engine.errors import TokenizerError

SPACE = "▁"  # replaces a space inside tokens

_CODE_POINTS = 0x110000
_CACHE_ENTRIES = 1 << 16
_CACHE_CHARACTERS = 32  # longer pieces rarely repeat, so they are not cached


class SentencePieceBpe:
    """Text → token ids by score-ordered merging with byte fallback.

    Args:
        token_to_id: V token strings, spaces written as "▁".
        scores: float32 (V,).
        byte_ids: id of the token of each of the 256 bytes, None where there is none.
        unknown_id: what a byte without a token becomes.

    Raises:
        TokenizerError: a byte has no token and there is no unknown token either.
    """

    def __init__(
        self,
        token_to_id: Mapping[str, int],
        scores: np.ndarray,
        byte_ids: list[int | None],
        unknown_id: int | None,
    ) -> None:
        missing = [byte for byte, id in enumerate(byte_ids) if id is None]
        if missing and unknown_id is None:
            raise TokenizerError(
                f"the vocabulary has no token for byte 0x{missing[0]:02X} (<0x{missing[0]:02X}>) and no unknown token; "
                "SentencePiece needs one of them for text outside the vocabulary"
            )
        self._token_to_id = token_to_id
        self._scores: list[float] = scores.tolist()
        self._byte_ids = [unknown_id if id is None else id for id in byte_ids]
        self._pairs = _neighbours(token_to_id)
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of text whose spaces are already written as "▁"; no lone surrogates."""
        ids: list[int] = []
        cache = self._cache
        for piece in self._pieces(text):
            known = cache.get(piece)
            if known is None:
                known = self._merge(piece)
                if len(piece) <= _CACHE_CHARACTERS:
                    if len(cache) >= _CACHE_ENTRIES:
                        cache.clear()
                    cache[piece] = known
            ids.extend(known)
        return ids

    def _pieces(self, text: str) -> list[str]:
        """Cuts between two characters that are neighbours in no token: no merge can cross there."""
        if len(text) < 2:
            return [text] if text else []
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)
        pairs = points[:-1] * _CODE_POINTS + points[1:]
        if len(self._pairs):
            places = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
            free = self._pairs[places] != pairs
        else:
            free = np.ones(len(pairs), dtype=bool)
        ends = [*(np.flatnonzero(free) + 1).tolist(), len(text)]
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _merge(self, piece: str) -> list[int]:
        """The merge loop on one piece: a linked list of symbols and a heap of joins (-score, left, length)."""
        token_to_id, scores = self._token_to_id, self._scores
        symbols = list(piece)
        after = [*range(1, len(symbols)), -1]
        before = list(range(-1, len(symbols) - 1))
        heap: list[tuple[float, int, int, int]] = []

        def propose(left: int, right: int) -> None:
            joined = symbols[left] + symbols[right]
            id = token_to_id.get(joined)
            if id is not None:
                heapq.heappush(heap, (-scores[id], left, right, len(joined)))

        for left in range(len(symbols) - 1):
            propose(left, left + 1)
        while heap:
            _, left, right, length = heapq.heappop(heap)
            # A side that was merged away is empty, and one that grew makes the lengths differ.
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            if before[left] >= 0:
                propose(before[left], left)
            if after[left] >= 0:
                propose(left, after[left])

        ids: list[int] = []
        for symbol in symbols:
            if symbol:
                id = token_to_id.get(symbol)
                if id is not None:
                    ids.append(id)
                else:
                    ids.extend(self._byte_ids[byte] for byte in symbol.encode())  # type: ignore[misc]
        return ids


def _neighbours(token_to_id: Mapping[str, int]) -> np.ndarray:
    """Sorted int64 codes (first * 0x110000 + second) of all pairs of characters side by side in some token."""
    text = "\n\n".join(token_to_id)  # joined so that one pass does it; the seams only add pairs, which is harmless
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)
    return np.unique(points[:-1] * _CODE_POINTS + points[1:])
