"""Let a model call a function of this program, by way of a server and the openai package.

    gguf-engine serve -m MODEL                          # in another terminal; the bundled model has no chat template:
    gguf-engine serve --chat-template-file examples/chat.jinja
    pip install openai
    python examples/tool_loop.py [http://127.0.0.1:8080/v1]

The first answer has to be a call, whose arguments fit the schema whatever the model is.
"""

import json
import sys
from typing import Any

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1"
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "forecast", "description": "The weather of the next days.", "parameters": PARAMETERS},
    }
]


def forecast(city: str, days: int) -> str:
    """What the model may ask for."""
    return f"{city}: sun for {days} days"


messages: Any = [{"role": "user", "content": "How will the weather be in Bern tomorrow?"}]
with OpenAI(base_url=url, api_key="none") as client:
    choice: Any = {"type": "function", "function": {"name": "forecast"}}
    while True:
        answer = client.chat.completions.create(
            model="tales", messages=messages, tools=TOOLS, tool_choice=choice, max_tokens=200, seed=1
        )
        message = answer.choices[0].message
        if not message.tool_calls:
            break
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            if call.type == "function":
                result = forecast(**json.loads(call.function.arguments))
                print("call:", call.function.name, "->", result)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        choice = "none"  # with a model that was trained for it: "auto"
    print("answer:", message.content)
