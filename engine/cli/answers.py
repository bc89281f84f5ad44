"""How the answer of a chat is written: what the model thinks first, its answer and its calls, each under a line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from engine.cli.terminal import write

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.request import GenerationResult, StreamChunk, ToolCall

_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"


class AnswerWriter:
    """Writes one answer as it comes. Without reasoning and calls only its text appears."""

    def __init__(self) -> None:
        self._thinking = False
        self._line_open = False
        self._apart = False  # something other than text was written

    def write(self, chunk: StreamChunk) -> None:
        """Write what a chunk brings."""
        self._write(chunk.reasoning, chunk.text, chunk.tool_calls)

    def write_result(self, result: GenerationResult) -> None:
        """Write a whole answer."""
        self._write(result.reasoning, result.text, result.tool_calls)
        self.close()

    def close(self) -> None:
        """End the answer's last line."""
        self._stop_thinking()
        if self._line_open or not self._apart:
            write("\n")

    def _write(self, reasoning: str, text: str, calls: Iterable[ToolCall]) -> None:
        if reasoning:
            if not self._thinking:
                self._line("--- thinking")
                self._thinking = self._apart = True
                write(_DIM if sys.stdout.isatty() else "")
            self._say(reasoning)
        if text:
            if self._apart and (self._thinking or not self._line_open):
                self._stop_thinking()
                self._line("--- answer")
            self._say(text)
        for call in calls:
            self._stop_thinking()
            self._line(f"--- call {call.name} {call.arguments}")
            self._apart = True

    def _stop_thinking(self) -> None:
        if self._thinking:
            write(_NORMAL if sys.stdout.isatty() else "")
        self._thinking = False

    def _line(self, line: str) -> None:
        write(("\n" if self._line_open else "") + line + "\n")
        self._line_open = False

    def _say(self, text: str) -> None:
        write(text)
        self._line_open = not text.endswith("\n")
