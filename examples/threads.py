"""Use one model from several threads: their requests join one batch.

    python examples/threads.py [model.gguf]

There is no background thread. A thread that waits for its tokens runs the next step for all; the others find theirs
when the step is done.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from engine import LLM, SamplingParams

prompts = ["The fox", "The hen", "The bear", "The miller's daughter", "A fisherman", "The youngest brother"]

with LLM(sys.argv[1] if len(sys.argv) > 1 else None) as llm:

    def complete(prompt: str) -> str:
        """One request; blocks the calling thread until its text is complete."""
        return prompt + llm.generate(prompt, SamplingParams(max_tokens=20, seed=5)).text

    with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
        together = list(pool.map(complete, prompts))
    for text in together:
        print(text)
    alone = [complete(prompt) for prompt in prompts]
print("the same texts one after the other:", together == alone)
