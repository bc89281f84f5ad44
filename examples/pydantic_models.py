"""Answers and arguments of tools as pydantic models, by way of a server and the openai package.

    gguf-engine serve -m MODEL                          # in another terminal; the bundled model has no chat template:
    gguf-engine serve --chat-template-file examples/chat.jinja
    pip install openai
    python examples/pydantic_models.py [http://127.0.0.1:8080/v1]

Both fit their models whatever the language model is: nothing else can be drawn.
"""

import sys
from typing import Any, Literal

from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1"


class Hero(BaseModel):
    """Who the tale is about."""

    name: str = Field(max_length=12)
    age: int = Field(ge=1, le=120)
    friends: list[Literal["fox", "owl", "bear"]] = Field(max_length=2)


class Travel(BaseModel):
    """Go to a place."""

    place: str = Field(max_length=20)
    how: Literal["on foot", "by boat"]


messages: Any = [{"role": "user", "content": "Tell me of a hero, then let the hero travel."}]
with OpenAI(base_url=url, api_key="none") as client:
    options: Any = {"model": "tales", "messages": messages, "max_tokens": 300, "seed": 1}
    hero = client.chat.completions.parse(response_format=Hero, **options).choices[0].message.parsed
    assert hero is not None, "max_tokens was too small"
    print(f"{hero.name!r} is {hero.age} and knows {len(hero.friends)}")
    answer = client.chat.completions.parse(
        tools=[pydantic_function_tool(Travel)], tool_choice="required", parallel_tool_calls=False, **options
    )
    for call in answer.choices[0].message.tool_calls or []:
        travel = call.function.parsed_arguments
        assert isinstance(travel, Travel), "parsed by the tool's own model"
        print(f"to {travel.place!r} {travel.how}")
