"""An agent through the anthropic package: it calls tools, streamed, until it answers with text.

gguf-engine serve -m MODEL                          # in another terminal; the bundled model has no chat template:
gguf-engine serve --chat-template-file examples/chat.jinja
pip install anthropic
python examples/anthropic_agent.py [http://127.0.0.1:8080]
"""

import sys
from typing import Any

from anthropic import Anthropic

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
CITY: Any = {"type": "string", "maxLength": 20}
TOOLS: Any = [
    {
        "name": "weather",
        "description": "How warm it is.",
        "input_schema": {"type": "object", "properties": {"city": CITY}, "required": ["city"]},
    },
    {
        "name": "distance",
        "description": "Kilometres between two cities.",
        "input_schema": {"type": "object", "properties": {"start": CITY, "end": CITY}, "required": ["start", "end"]},
    },
]


def call(name: str, arguments: Any) -> str:
    """Do what the model asks for; what goes wrong is told to it."""
    try:
        if name == "weather":
            return f"21 degrees in {arguments['city']}"
        return f"{len(arguments['start']) + len(arguments['end'])} km"
    except KeyError as missing:  # of a call that max_tokens has cut off
        return f"error: {missing} is missing"


messages: Any = [{"role": "user", "content": "Is it warm in Bern, and how far is it from Basel?"}]
with Anthropic(base_url=url, api_key="none") as client:
    for turn in range(3):
        # A model that was trained for tools decides itself: {"type": "auto"} in all turns.
        choice: Any = [{"type": "any", "disable_parallel_tool_use": True}, {"type": "auto"}, {"type": "none"}][turn]
        with client.messages.stream(
            model="tales", max_tokens=200, messages=messages, tools=TOOLS, tool_choice=choice, extra_body={"seed": 1}
        ) as stream:
            for event in stream:
                if event.type == "text":
                    print(event.text, end="", flush=True)
                elif event.type == "input_json":
                    print(event.partial_json, end="", flush=True)
                elif event.type == "content_block_start" and event.content_block.type == "tool_use":
                    print(f"\ncall of {event.content_block.name}: ", end="")
            answer = stream.get_final_message()
        print(f"\n[{answer.stop_reason}]")
        calls = [block for block in answer.content if block.type == "tool_use"]
        if not calls:
            break
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": call(block.name, block.input)}
            for block in calls
        ]
        messages += [
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]},
            {"role": "user", "content": results},
        ]
