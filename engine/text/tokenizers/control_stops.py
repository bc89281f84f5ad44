"""Stop strings that name control tokens, which never appear in the text that is shown."""

from collections.abc import Sequence

from engine.text.tokenizers.tokenizer import Tokenizer

_FIRST = 0xD800  # surrogates: no decoded text has one, so that one of them can be a token
_MOST = 0x800


class ControlStops:
    """Makes control tokens visible to a search for stop strings, and to nothing else.

    Args:
        stops: the stop strings.
        tokenizer: whose control tokens they may name.

    Attributes:
        stops: the strings to look for: those given, and for each that names control tokens the same with one character
            in place of each.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer) -> None:
        self._characters: dict[int, str] = {}
        self.stops = list(stops)
        for stop in stops:
            pieces = tokenizer.control_pieces(stop)
            if any(isinstance(piece, int) for piece in pieces):
                self.stops.append(
                    "".join(piece if isinstance(piece, str) else self._character(piece) for piece in pieces)
                )
        self._shown = dict.fromkeys(map(ord, self._characters.values()))

    def _character(self, token_id: int) -> str:
        if token_id not in self._characters:
            assert len(self._characters) < _MOST, "the number of stop strings is limited"
            self._characters[token_id] = chr(_FIRST + len(self._characters))
        return self._characters[token_id]

    def mark(self, token_id: int) -> str:
        """The character of a drawn token in the text that is searched; "" for tokens that no stop string names."""
        return self._characters.get(token_id, "")

    def shown(self, text: str) -> str:
        """Searched text without the tokens."""
        return text.translate(self._shown) if self._shown else text
