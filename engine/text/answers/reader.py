"""Chunks of an answer as they come from the engine → chunks with content, reasoning and calls apart."""

from engine.request import StreamChunk
from engine.text.answers.parser import AnswerParser


class AnswerReader:
    """Reads the chunks of one request.

    Args:
        parser: of the answer.
        calls_as_text: whether the chat template takes calls only as text.
    """

    def __init__(self, parser: AnswerParser, *, calls_as_text: bool = False) -> None:
        self._parser = parser
        self._calls_as_text = calls_as_text
        self._called = False

    def read(self, chunk: StreamChunk) -> StreamChunk:
        """The chunk with its text taken apart; the last one has what was held back."""
        piece = self._parser.push(chunk.text)
        content, reasoning = piece.content, piece.reasoning
        calls, parts = piece.tool_calls, piece.call_parts
        if chunk.finish_reason is not None:
            last = self._parser.finish()
            content, reasoning = content + last.content, reasoning + last.reasoning
            calls, parts = [*calls, *last.tool_calls], [*parts, *last.call_parts]
        self._called = self._called or bool(calls)
        return chunk._replace(text=content, reasoning=reasoning, tool_calls=tuple(calls), call_parts=tuple(parts))

    @property
    def text_with_calls(self) -> str | None:
        """The text with its calls written out; None where there are none or the template reads them from their key."""
        return self._parser.text_with_calls if self._called and self._calls_as_text else None
