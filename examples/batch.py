"""Complete several prompts in one batch, each with settings of its own, and draw several samples of one prompt.

    python examples/batch.py [model.gguf]

All prompts run side by side and share the reads of the weights. With a seed each text is the same as if it ran alone.
"""

import sys

from engine import LLM, SamplingParams

prompts = ["Once upon a time", "The old king", "In the forest there lived"]
settings = [
    SamplingParams(max_tokens=24, temperature=0),
    SamplingParams(max_tokens=24, seed=7),
    SamplingParams(max_tokens=24, seed=7, stop=["."]),
]

with LLM(sys.argv[1] if len(sys.argv) > 1 else None) as llm:
    for prompt, result in zip(prompts, llm.generate(prompts, settings), strict=True):
        print(f"{prompt}{result.text} [{result.finish_reason}]")

    first = llm.generate("The cat said", SamplingParams(max_tokens=12, seed=3, n=3))  # the prompt is read once
    for number, sample in enumerate(first.samples, start=1):
        print(f"sample {number}, seed {sample.seed}: The cat said{sample.text}")
