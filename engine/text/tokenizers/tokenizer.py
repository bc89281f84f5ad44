"""The tokenizer: text ↔ token ids, from GGUF metadata alone.

It cuts special tokens out of the text, gives the rest to the algorithm of the vocabulary's kind (`encoding.py`), and
adds the tokens that the model expects at the ends. Independent of models, devices and files.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from engine.errors import InvalidRequestError
from engine.frozen import FrozenDict
from engine.text.tokenizers.bpe import byte_level_bytes
from engine.text.tokenizers.encoding import Spelling, build_encoding
from engine.text.tokenizers.longest_match import unescape
from engine.text.tokenizers.special_tokens import TokenType
from engine.text.tokenizers.splitter import SpecialSplitter
from engine.text.tokenizers.spm import SPACE
from engine.text.tokenizers.vocabulary import KINDS, Vocabulary, flag

_NORMAL = int(TokenType.NORMAL)  # comparing members costs more than all else of most tokens
_APART = frozenset({TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED})
"""Types of tokens that are no plain text: see Tokenizer.decode_step."""

logger = logging.getLogger(__name__)


class Tokenizer:
    """Text to token ids and back, exactly as the model was trained on. Safe to share between threads.

    Attributes:
        kind: the algorithm, for people ("byte-level BPE").
        pre: name of the pre-tokenizer in use; None for kinds that have none.
        vocab_size: V, the number of tokens.
        add_bos: `encode(add_special=True)` puts BOS first.
        add_eos: `encode(add_special=True)` puts EOS last.
        add_sep: SEP goes between two texts that are read together; WordPiece's `encode(add_special=True)` puts it last.
        drops_first_space: tokens at the start of a text carry a space that the text does not have; `decode` removes it.
        eog_ids: ids that end a generation: EOS, end of turn, end of message.
        special_ids: token id by role, only those there are: "bos", "eos", "eot", "unk", "pad", "fim_pre" …
    """

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any], pre: str | None) -> None:
        self._vocabulary = vocabulary
        self._bytes: dict[int, bytes] = {}
        self.simple_texts: dict[int, str | None] = {}
        self.kind = KINDS[vocabulary.kind]
        self.vocab_size = len(vocabulary.tokens)
        self.special_ids: Mapping[str, int] = FrozenDict(vocabulary.ids)
        self.eog_ids = vocabulary.eog_ids
        self._encoding = encoding = build_encoding(vocabulary, metadata, pre)
        self._spelled = _SPELLED[encoding.spelling]
        self.pre = encoding.pre
        self.drops_first_space = encoding.drop_space
        self.add_bos = self._wants("bos", flag(metadata, "tokenizer.ggml.add_bos_token", encoding.add_bos))
        self.add_eos = self._wants("eos", flag(metadata, "tokenizer.ggml.add_eos_token", encoding.add_eos))
        self.add_sep = self._wants("sep", flag(metadata, "tokenizer.ggml.add_sep_token", encoding.add_sep))
        self._ends = tuple(role for role in ("eos", "sep") if getattr(self, f"add_{role}"))
        if not encoding.sep_last:
            self._ends = tuple(role for role in self._ends if role != "sep")
        swallow_right = _swallowing(vocabulary, metadata)
        self._longest = max(map(len, vocabulary.tokens)) if encoding.keeps_all and not swallow_right else None
        self._all_specials = _splitter(
            vocabulary, {TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED}, swallow_right
        )
        self._user_specials = _splitter(vocabulary, {TokenType.USER_DEFINED}, swallow_right)
        self._controls = _splitter(vocabulary, {TokenType.CONTROL, TokenType.UNKNOWN}, frozenset())

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, pre: str | None = None) -> "Tokenizer":
        """Builds the tokenizer a GGUF file describes.

        Args:
            metadata: the file's metadata (`GGUFFile.metadata`).
            pre: name of a pre-tokenizer to use instead of the file's (`engine.text.tokenizers.pretokenizers`).

        Raises:
            TokenizerError: no tokenizer in the file, an unsupported one, or malformed metadata.
        """
        return cls(Vocabulary.from_metadata(metadata), metadata, pre)

    def _wants(self, role: str, wanted: bool) -> bool:
        if wanted and role not in self.special_ids:
            logger.warning("the file asks for a %s token at the ends of text but names none: not added", role.upper())
            return False
        return wanted

    @property
    def bos_id(self) -> int | None:
        """Beginning of sequence."""
        return self.special_ids.get("bos")

    @property
    def eos_id(self) -> int | None:
        """End of sequence."""
        return self.special_ids.get("eos")

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any string; a lone surrogate counts as U+FFFD.
            add_special: put BOS first and EOS last where the model expects them.
            parse_special: control tokens written out in the text (`<|im_end|>`) become those tokens; otherwise they
                are plain text. User-defined tokens are always recognised.

        Raises:
            InvalidRequestError: `text` is not a string.
        """
        if not isinstance(text, str):
            raise InvalidRequestError(f"text to encode must be a str, found {type(text).__name__}")
        text = _without_surrogates(text)
        ids: list[int] = []
        if add_special and self.add_bos:
            ids.append(self.special_ids["bos"])
        encoding = self._encoding
        space_due = encoding.space_first
        for piece in (self._all_specials if parse_special else self._user_specials).split(text):
            if isinstance(piece, int):
                ids.append(piece)
                space_due = encoding.space_first
                continue
            if space_due:
                piece = " " + piece
                space_due = False
            ids.extend(encoding.encoder.encode(piece.replace(" ", SPACE) if encoding.escape_spaces else piece))
        if add_special:
            ids.extend(self.special_ids[role] for role in self._ends)
        return ids

    def fewest_tokens(self, text: str) -> int:
        """A number that `encode` does not go below, from the text's length alone; 0 where the algorithm allows none.

        Long texts are encoded at some megabytes a second, so those that can fit nowhere are better refused by this.
        """
        return 0 if self._longest is None else -(-len(self.without_bos(text)) // self._longest)

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered chat template: one BOS, whether the template writes it or not, and no end token."""
        rest = self.without_bos(text)
        ids = self.encode(rest, add_special=False)
        return [self.special_ids["bos"], *ids] if rest != text or self.add_bos else ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt: `encode`, but with one BOS where the text begins with the name of that token."""
        if not isinstance(text, str) or not self.add_bos:
            return self.encode(text)
        rest = self.without_bos(text)
        if rest != text:
            logger.warning(
                "the prompt begins with %s, which this model puts before every text: it is taken once",
                self.token_text(self.special_ids["bos"]),
            )
        return self.encode(rest)

    def without_bos(self, text: str) -> str:
        """A text without the names of the BOS token at its beginning."""
        name, place = "" if self.bos_id is None else self.token_text(self.bos_id), 0
        while name and text.startswith(name, place):
            place += len(name)
        return text[place:]

    def control_pieces(self, text: str) -> list[str | int]:
        """A text cut at the names of control tokens: other text as it is, and the ids of the tokens."""
        return list(self._controls.split(text))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """The text of `ids`; bytes that are no valid UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave control and unknown tokens out; otherwise they appear by name.
            continuation: the ids continue a text (a generation after its prompt), so their first space belongs to the
                text. By default the space that SentencePiece models get before the first word is removed again.

        Raises:
            InvalidRequestError: an id is outside the vocabulary.
        """
        pieces: list[bytes] = []
        drop_space = self.drops_first_space and not continuation
        for id in ids:
            piece, drop_space = self.decode_step(id, skip_special=skip_special, drop_space=drop_space)
            pieces.append(piece)
        return b"".join(pieces).decode("utf-8", "replace")

    def decode_step(self, id: int, *, skip_special: bool, drop_space: bool) -> tuple[bytes, bool]:
        """Bytes that one id adds to a text, and whether the next id still has to lose a leading space.

        This undoes `encode`, which puts a space before text at the start and after each special token.
        """
        piece = self.token_bytes(id)
        if self._vocabulary.is_special(id):
            return b"" if skip_special else piece, self.drops_first_space
        if self._vocabulary.types[id] == TokenType.USER_DEFINED:
            return piece, self.drops_first_space
        if drop_space and piece.startswith(b" "):
            piece = piece[1:]
        return piece, False

    def simple_text(self, id: int) -> str | None:
        """The text that a token of ASCII adds behind another such token; None for all other tokens."""
        try:
            return self.simple_texts[id]
        except KeyError:
            piece = self.token_bytes(id)
            simple = piece.isascii() and self.token_type(id) not in _APART
            self.simple_texts[id] = found = piece.decode("ascii") if simple else None
            return found

    def token_bytes(self, id: int) -> bytes:
        """The bytes of token `id`; special tokens give their name, unused ones nothing."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._compute_bytes(self._checked(id))
        return found

    def token_text(self, id: int) -> str:
        """Token `id` for people: its bytes as text, U+FFFD where they are part of a character."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def token_type(self, id: int) -> TokenType:
        """The token's type."""
        return TokenType(self._vocabulary.types[self._checked(id)])

    def is_control(self, id: int) -> bool:
        """True for tokens that steer the model and are left out of text: control and unknown tokens."""
        return self._vocabulary.is_special(self._checked(id))

    def token_id(self, token: str) -> int | None:
        """Id of the token that the vocabulary writes as `token` (`<|im_end|>`, `▁the`, `Ġthe`), or None."""
        return self._vocabulary.token_to_id.get(token)

    def _checked(self, id: int) -> int:
        try:
            index = id.__index__()
        except AttributeError:
            raise InvalidRequestError(f"a token id must be an integer, found {id!r}") from None
        if not 0 <= index < self.vocab_size:
            raise InvalidRequestError(f"token id {index} is outside the vocabulary: 0 to {self.vocab_size - 1}")
        return index

    def _compute_bytes(self, id: int) -> bytes:
        token, type = self._vocabulary.tokens[id], self._vocabulary.types[id]
        if type != _NORMAL:
            if type == TokenType.BYTE and (byte := _byte_value(token)) is not None:
                return bytes([byte])
            if type in (TokenType.UNUSED, TokenType.UNDEFINED):
                return b""
            if type != TokenType.BYTE:
                return token.encode()
        return self._spelled(token)


def _unescaped(token: str) -> bytes:
    return token.replace(SPACE, " ").encode()


_SPELLED: Mapping[Spelling, Callable[[str], bytes]] = {
    Spelling.BYTE_ALPHABET: byte_level_bytes,
    Spelling.ESCAPED_SPACES: _unescaped,
    Spelling.BACKSLASHES: unescape,
    Spelling.PLAIN: str.encode,
}
"""The bytes of a token that text is cut into, by the vocabulary's spelling."""


def _splitter(vocabulary: Vocabulary, types: set[TokenType], swallow_right: frozenset[int]) -> SpecialSplitter:
    pairs = ((token, id) for token, id in vocabulary.token_to_id.items() if vocabulary.types[id] in types)
    return SpecialSplitter(pairs, swallow_right)


def _swallowing(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> frozenset[int]:
    """Special tokens that take the white space after them: those of Phi-3, for which there is no metadata key."""
    name = metadata.get("general.name")
    if not isinstance(name, str) or not any(part in name.lower() for part in ("phi-3", "phi3")):
        return frozenset()
    special = {TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED}
    keep = {"<unk>", "<s>", "<|endoftext|>"}
    return frozenset(
        id
        for id, token in enumerate(vocabulary.tokens)
        if (vocabulary.types[id] in special and token not in keep) or token == "</s>"
    )


def _byte_value(token: str) -> int | None:
    """The byte that a token such as `<0x0A>` names; None for anything else."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
