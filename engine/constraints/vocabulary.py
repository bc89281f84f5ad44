"""A model's vocabulary in the form that llguidance reads; it makes a trie of it once per model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

from llguidance import LLTokenizer, TokenizerWrapper

from engine.text import Tokenizer

ANCHOR = "\x02"

SHORT, REMEMBERED = 256, 4096
"""Bytes of texts whose tokens are remembered, and how many: names of properties come again in every text."""


class VocabularyView:
    """What llguidance asks of a tokenizer: the bytes of every token, which ones are special, and encoding.

    Args:
        tokenizer: the model's.
        n_tokens: rows of the model's logits; those that the vocabulary does not name can never be drawn.
        end_id: the token that ends a text.

    Attributes:
        tokens: the bytes of every token; special tokens have their name, unnamed rows nothing.
        special_token_ids: tokens that can be drawn only where a grammar names them.
        trie: what was made of this view, once it exists.
    """

    def __init__(self, tokenizer: Tokenizer, n_tokens: int, end_id: int, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._remembered = lru_cache(REMEMBERED)(self._encode)
        self.trie: LLTokenizer | None = None
        self.eos_token_id = end_id
        self.bos_token_id = tokenizer.bos_id
        named = min(tokenizer.vocab_size, n_tokens)
        self.tokens: Sequence[bytes] = [tokenizer.token_bytes(i) for i in range(named)] + [b""] * (n_tokens - named)
        self.special_token_ids = sorted({i for i in range(named) if tokenizer.is_control(i)} | set(end_ids))

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids whose bytes are exactly `text`, as the tokenizer cuts it.

        Where encoding puts SentencePiece's space in front, a character that joins no other goes before the text. Where
        a tokenizer changes the text (lower case, other spaces), the longest tokens serve.
        """
        wanted = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
        is_kept = self.trie is not None and len(wanted) <= SHORT
        return list(self._remembered(wanted) if is_kept else self._encode(wanted))

    def _encode(self, wanted: bytes) -> Sequence[int]:
        word = wanted.decode("utf-8", "replace")
        for before in ("", ANCHOR):
            ids = self._tokenizer.encode(before + word, add_special=False, parse_special=False)
            start, missing = len(ids), len(wanted)
            while missing > 0 and start > 0:
                start -= 1
                missing -= len(self.tokens[ids[start]])
            if b"".join(self.tokens[i] for i in ids[start:]) == wanted:
                return ids[start:]
        return [] if self.trie is None else self.trie.greedy_tokenize(word)


def build_trie(tokenizer: Tokenizer, n_rows: int, end_ids: Collection[int]) -> LLTokenizer:
    """The trie of a vocabulary.

    Args:
        tokenizer: the model's.
        n_rows: rows of the model's logits.
        end_ids: tokens that may be drawn where a text may end. Where the model has none, one behind the last row
            serves: it can never be drawn, so that only a text that cannot go on ends.
    """
    ends = sorted(i for i in end_ids if i < n_rows)
    n_tokens = n_rows if ends else n_rows + 1
    view = VocabularyView(tokenizer, n_tokens, ends[0] if ends else n_rows, ends)
    view.trie = LLTokenizer(TokenizerWrapper(view), n_vocab=n_tokens, eos_token=ends or [n_rows])
    return view.trie
