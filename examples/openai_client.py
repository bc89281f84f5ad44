"""Ask a running server with the openai package: a whole text, a stream, and several at once.

    gguf-engine serve                                   # in another terminal
    pip install openai
    python examples/openai_client.py [http://127.0.0.1:8080/v1]

The same code works with every server that speaks this API.
"""

import asyncio
import sys

from openai import AsyncOpenAI, OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1"


async def several(prompts: list[str]) -> list[str]:
    """Complete prompts side by side; the server reads them in one batch."""
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        calls = [client.completions.create(model="tales", prompt=prompt, max_tokens=16, seed=1) for prompt in prompts]
        return [answer.choices[0].text for answer in await asyncio.gather(*calls)]


with OpenAI(base_url=url, api_key="none") as client:
    print("models:", ", ".join(model.id for model in client.models.list()))
    for chunk in client.completions.create(model="tales", prompt="The sea", max_tokens=40, seed=1, stream=True):
        print(chunk.choices[0].text, end="", flush=True)
    print()
prompts = ["Once upon a time", "The old king"]
for prompt, text in zip(prompts, asyncio.run(several(prompts)), strict=True):
    print(prompt + text)
