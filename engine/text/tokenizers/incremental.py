"""Token ids → text, one id at a time, never showing half a character.

Of the tokenizer only `decode_step` is used.
"""

import codecs
from collections.abc import Collection

from engine.text.tokenizers.tokenizer import Tokenizer


class IncrementalDecoder:
    """Decodes ids one after the other; all `push` results and `finish` joined equal `tokenizer.decode(ids)`.

    Bytes of an incomplete UTF-8 character wait for the next token. Bytes that cannot become a character any more come
    out as U+FFFD.

    Args:
        tokenizer: what to decode with.
        skip_special: leave control tokens out.
        continuation: the ids continue a text, so a first space is part of it (see `Tokenizer.decode`).
        shown: control tokens that appear by name all the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special: bool = True,
        continuation: bool = False,
        shown: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._shown_ids = shown
        self._drop_space = tokenizer.drops_first_space and not continuation
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._known = tokenizer.simple_texts
        self._simple = not self._drop_space  # no character is incomplete, and no space is to be dropped

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often "" in the middle of a character."""
        if self._simple:  # mostly, and several times faster
            text = self._known.get(token_id) or self._tokenizer.simple_text(token_id)
            if text is not None:
                return text
        piece, self._drop_space = self._tokenizer.decode_step(
            token_id,
            skip_special=self._skip_special and token_id not in self._shown_ids,
            drop_space=self._drop_space,
        )
        text = self._utf8.decode(piece)
        self._simple = not self._drop_space and not self._utf8.getstate()[0]
        return text

    def finish(self) -> str:
        """What was still held back: "" or U+FFFD for an incomplete character. The decoder is then ready for new ids."""
        self._simple = False
        return self._utf8.decode(b"", final=True)
