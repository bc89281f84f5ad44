"""Use a model from an asyncio program: several tasks share one batch, and a cancelled task frees its place at once.

python examples/asyncio_llm.py [model.gguf]

A thread of its own steps the model; the event loop stays free for other work.
"""

import asyncio
import sys

from engine import LLM, AsyncLLM, SamplingParams


async def tell(llm: AsyncLLM, prompt: str, seed: int) -> str:
    """The prompt and what follows it."""
    result = await llm.generate(prompt, SamplingParams(max_tokens=24, seed=seed))
    return prompt + result.text


async def main(path: str | None) -> None:
    """Stream one text, complete three at once, and give one up."""
    async with AsyncLLM(LLM(path)) as llm:
        async for chunk in await llm.stream("The sea", SamplingParams(max_tokens=40, seed=1)):
            print(chunk.text, end="", flush=True)
        print()
        prompts = ["Once upon a time", "The old king", "In the forest there lived"]
        for text in await asyncio.gather(*(tell(llm, prompt, seed) for seed, prompt in enumerate(prompts))):
            print(text)
        try:
            async with asyncio.timeout(0.2):
                await llm.generate("The longest story", SamplingParams(ignore_eos=True))
        except TimeoutError:
            while llm.n_requests:  # it ends before the next step
                await asyncio.sleep(0.01)
            print("given up; requests left:", llm.n_requests)


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))
