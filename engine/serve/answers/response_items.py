"""The items of a response of /v1/responses: reasoning, messages and calls, whole or opened, filled and closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from engine.request import CallPart, GenerationResult, ToolCall
from engine.serve.answers.wording import is_json, new_id

Event = Callable[..., bytes]
"""Makes an event of its type and its values."""


def items_of(result: GenerationResult) -> list[dict[str, Any]]:
    """The items of a whole answer."""
    items = []
    if result.reasoning:
        items.append(_reasoning(new_id("rs_"), result.reasoning))
    if result.text or not result.tool_calls:
        items.append(_message(new_id("msg_"), result.text, "completed"))
    return items + [_call(call, "completed" if is_json(call.arguments) else "incomplete") for call in result.tool_calls]


class ItemStream:
    """Tells the items of one answer while they come, one of them open at a time.

    Args:
        event: makes an event.

    Attributes:
        output: the items that are closed.
    """

    def __init__(self, event: Event) -> None:
        self._event = event
        self._kind = ""  # of the open item
        self._id = ""
        self._text = ""
        self._call = ToolCall("", "", "")
        self.output: list[dict[str, Any]] = []

    def reason(self, text: str, **extra: Any) -> Iterator[bytes]:
        """More reasoning."""
        yield from self._open("reasoning", "rs_")
        yield self._delta("response.reasoning_text.delta", text, content_index=0, **extra)

    def say(self, text: str, **extra: Any) -> Iterator[bytes]:
        """More of the answer's text."""
        if self._kind != "message":
            yield from self._open("message", "msg_")
            yield self._event("response.content_part.added", **self._place(content_index=0), part=_part(""))
        if text:
            yield self._delta("response.output_text.delta", text, content_index=0, logprobs=[], **extra)

    def call(self, part: CallPart, **extra: Any) -> Iterator[bytes]:
        """A call that begins, or more of its arguments."""
        if part.name is not None:
            yield from self.close()
            self._kind, self._call = "call", ToolCall(part.id or "", part.name, "")
            item = _call(self._call, "in_progress")
            self._id = item["id"]
            yield self._event("response.output_item.added", output_index=len(self.output), item=item)
        if part.arguments:
            yield self._delta("response.function_call_arguments.delta", part.arguments, **extra)

    def close(self) -> Iterator[bytes]:
        """The end of the open item, if there is one."""
        kind, text, place = self._kind, self._text, self._place()
        if not kind:
            return
        if kind == "reasoning":
            item = _reasoning(self._id, text)
            yield self._event("response.reasoning_text.done", **place, content_index=0, text=text)
        elif kind == "message":
            item = _message(self._id, text, "completed")
            yield self._event("response.output_text.done", **place, content_index=0, text=text, logprobs=[])
            yield self._event("response.content_part.done", **place, content_index=0, part=_part(text))
        else:
            call = ToolCall(self._call.id, self._call.name, text)
            item = _call(call, "completed" if is_json(text) else "incomplete")
            yield self._event("response.function_call_arguments.done", **place, arguments=text, name=call.name)
        yield self._event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)
        self._kind, self._text = "", ""

    def _open(self, kind: str, prefix: str) -> Iterator[bytes]:
        if self._kind == kind:
            return
        yield from self.close()
        self._kind, self._id = kind, new_id(prefix)
        item = _reasoning(self._id, None) if kind == "reasoning" else _message(self._id, None, "in_progress")
        yield self._event("response.output_item.added", output_index=len(self.output), item=item)

    def _delta(self, event: str, text: str, **values: Any) -> bytes:
        self._text += text
        return self._event(event, **self._place(), delta=text, **values)

    def _place(self, **values: Any) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": len(self.output), **values}


def _message(id: str, text: str | None, status: str) -> dict[str, Any]:
    content = [] if text is None else [_part(text)]
    return {"id": id, "type": "message", "status": status, "role": "assistant", "content": content}


def _reasoning(id: str, text: str | None) -> dict[str, Any]:
    content = [] if text is None else [{"type": "reasoning_text", "text": text}]
    return {"id": id, "type": "reasoning", "summary": [], "content": content}


def _call(call: ToolCall, status: str) -> dict[str, Any]:
    return {
        "id": f"fc_{call.id}",
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
