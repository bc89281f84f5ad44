"""WordPiece: words cut like BERT's, then the longest token first.

The words come from the `tokenizers` library (clean-up, lower case, accents, Chinese characters and punctuation on their
own). A GGUF file writes a token that begins a word with "▁" and one that continues it as it is. Independent
of special tokens and metadata keys.
"""

from collections.abc import Mapping

from engine.text.tokenizers.spm import SPACE


class WordPiece:
    """Text → token ids by greedy longest match inside each word (Devlin et al. 2018).

    Args:
        token_to_id: V token strings; "▁" marks the beginning of a word.
        unknown_id: what a word becomes that the tokens cannot spell; None leaves it out.
        lowercase: fold letters to lower case.
        strip_accents: remove accents.
    """

    def __init__(
        self, token_to_id: Mapping[str, int], unknown_id: int | None, *, lowercase: bool, strip_accents: bool
    ) -> None:
        from tokenizers.normalizers import BertNormalizer
        from tokenizers.pre_tokenizers import BertPreTokenizer

        self._token_to_id = token_to_id
        self._unknown = [] if unknown_id is None else [unknown_id]
        self._longest = max(map(len, token_to_id), default=0)
        self._normalizer = BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
        self._words = BertPreTokenizer()

    def encode(self, text: str) -> list[int]:
        """Token ids of text without special tokens; no lone surrogates."""
        ids: list[int] = []
        # The library would keep U+FFFD as a letter; BERT's clean-up takes it out.
        normal = self._normalizer.normalize_str(text.replace("\ufffd", ""))
        for word, _ in self._words.pre_tokenize_str(normal):
            ids.extend(self._spell(SPACE + word))
        return ids

    def _spell(self, word: str) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(word):
            # No token is longer than the longest, so an endless word costs linear time.
            for end in range(min(len(word), start + self._longest), start, -1):
                id = self._token_to_id.get(word[start:end])
                if id is not None:
                    ids.append(id)
                    start = end
                    break
            else:
                return self._unknown
        return ids
