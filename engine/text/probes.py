"""Words that templates are rendered with to find out what they do with them; no real template contains them."""

from typing import Any

WORDS = ("Qzfirst", "Qzsecond")
"""Contents of messages."""

THOUGHT = "Qzthought"
"""Reasoning of the assistant."""

CALL_NAME = "qzlook"
"""Name of the one tool."""

CALL_VALUE = "qzvalue"
"""Argument that the tool is called with."""

CALL_KEYS = ("qzkey", "qzmore")
"""Names of its parameters: two, as families differ in what is between them."""

CALL: dict[str, Any] = {
    "id": "qzidnine9",
    "type": "function",
    "function": {"name": CALL_NAME, "arguments": dict.fromkeys(CALL_KEYS, CALL_VALUE)},
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": CALL_NAME,
            "description": "Looks.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": "What."} for key in CALL_KEYS},
                "required": list(CALL_KEYS),
            },
        },
    }
]

RESULT: dict[str, Any] = {"role": "tool", "content": "Seen", "tool_call_id": "qzidnine9", "name": CALL_NAME}
