"""From drawn tokens to streamed text: decoding, stop conditions and the finish reason of one request.

Knows tokenizers and parameters; knows nothing of devices, caches or other requests.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from engine.request import Request, TokenSample
from engine.sampling.stop import StopStringMatcher
from engine.text import ControlStops, IncrementalDecoder, Tokenizer


class OutputAssembler:
    """Turns the tokens of one request into text, one token at a time.

    Args:
        request: the request; its parameters say when to stop.
        tokenizer: None where the model has none; all text is empty then.
        eog_ids: tokens that end the generation unless params.ignore_eos.
        shown_ids: control tokens that appear in the text by name.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        eog_ids: Collection[int],
        shown_ids: Collection[int] = (),
    ) -> None:
        params = request.params
        self._begin = request, tokenizer, eog_ids, shown_ids
        self._decoder: IncrementalDecoder | None = None
        self._controls: ControlStops | None = None
        self._shown_ids = shown_ids
        self._vocab_size = 0
        if tokenizer is not None:
            # A first space belongs to the text unless the prompt's last token would swallow it in decode() as well.
            last = request.prompt_ids[-1]
            after_text = last >= tokenizer.vocab_size or not tokenizer.is_control(last)
            self._decoder = IncrementalDecoder(tokenizer, continuation=after_text, shown=shown_ids)
            self._vocab_size = tokenizer.vocab_size
            self._controls = ControlStops(params.stop, tokenizer) if params.stop else None
        stops = params.stop if self._controls is None else self._controls.stops
        self._matcher = StopStringMatcher(stops) if stops else None
        self._stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eog_ids))
        self._left = request.max_output
        self._mask = request.mask
        self._plain = self._matcher is None and self._mask is None
        self._output_ids: list[int] = []  # kept for the mask alone

    def push(self, sample: TokenSample) -> tuple[str, str | None]:
        """Take one token; returns the text that may be shown now and the finish reason, None while it goes on."""
        self._left -= 1  # first of all: see n_pushed
        if sample.token_id in self._stop_ids:
            return self._flush(), "stop"
        if self._plain and self._left > 0:  # mostly
            return self._decode(sample.token_id), None
        text = self._decode(sample.token_id)
        if self._matcher is not None:
            text = self._shown(self._matcher.push(text + self._mark(sample.token_id)))
            if self._matcher.matched is not None:
                return text, "stop"
        is_complete = self._mask is not None and self._is_complete(sample.token_id)
        if is_complete or self._left <= 0:
            rest = self._flush()
            stopped = is_complete or (self._matcher is not None and self._matcher.matched is not None)
            return text + rest, "stop" if stopped else "length"
        return text, None

    def is_end(self, token_id: int) -> bool:
        """Whether the text ends with this token, of which nothing is shown."""
        return token_id in self._stop_ids

    @property
    def n_pushed(self) -> int:
        """Tokens taken, one that an exception cut short included."""
        return self._begin[0].max_output - self._left

    def begun_again(self, token_ids: Sequence[int]) -> OutputAssembler:
        """A new one that has taken these tokens."""
        new = OutputAssembler(*self._begin)
        new._mask = None  # it is ahead of these tokens, of which none was the last
        for token_id in token_ids:
            new.push(TokenSample(token_id))
        new._mask, new._output_ids = self._mask, list(token_ids)
        return new

    def _is_complete(self, token_id: int) -> bool:
        """Whether the request's constraint allows nothing behind this token."""
        if self._mask is None:
            return False
        self._output_ids.append(token_id)
        return self._mask.is_complete(self._output_ids)

    def _decode(self, token_id: int) -> str:
        """New text of one token; a row of the output matrix that the vocabulary does not name has none."""
        if self._decoder is None or token_id >= self._vocab_size:
            return ""
        return self._decoder.push(token_id)

    def _flush(self) -> str:
        """What was held back: half a character, the possible beginning of a stop string."""
        text = self._decoder.finish() if self._decoder is not None else ""
        if self._matcher is not None:
            text = self._matcher.push(text)
            text = self._shown(text + self._matcher.finish())  # "" after a match
        return text

    def _mark(self, token_id: int) -> str:
        """The character of a token without text in the search for stop strings."""
        return "" if self._controls is None or token_id in self._shown_ids else self._controls.mark(token_id)

    def _shown(self, text: str) -> str:
        """Text that was searched for stop strings, without the control tokens that were put in for the search."""
        return text if self._controls is None else self._controls.shown(text)
