"""Answers that programs can read: a pydantic model, a choice, a pattern, a grammar; whole and as a stream.

python examples/structured_output.py
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from engine import LLM, Choice, Gbnf, JsonSchema, Regex, SamplingParams

Name = Annotated[str, Field(max_length=12)]


class Hero(BaseModel):
    """What the answer has to be."""

    model_config = ConfigDict(extra="forbid")  # without it a model may go on with properties of its own

    name: Name
    age: int = Field(ge=0, le=120)
    friends: list[Name] = Field(max_length=2)


LIST = r"""
root ::= item item?
item ::= "- " [a-z]+ "\n"
"""

with LLM() as llm:
    params = SamplingParams(constraint=JsonSchema(Hero), max_tokens=300, seed=1)
    result = llm.generate("Once upon a time there was a boy called Hans. As JSON: ", params)
    if result.finish_reason == "stop":  # "length": max_tokens was too small, and the JSON is cut off
        hero = Hero.model_validate_json(result.text)
        print(f"{hero.name!r} is {hero.age} years old and has {len(hero.friends)} friends")

    print(llm.generate("Was he afraid? ", SamplingParams(constraint=Choice(["yes", "no"]), seed=1)).text)
    print(llm.generate("He came at ", SamplingParams(constraint=Regex(r"[0-2][0-9]:[0-5][0-9]"), seed=1)).text)
    for chunk in llm.stream("In the forest:\n", SamplingParams(constraint=Gbnf(LIST), max_tokens=40, seed=1)):
        print(chunk.text, end="", flush=True)
    print()
