"""Print a text while it is generated.

    python examples/stream.py ["the beginning" [model.gguf]]

Each chunk holds what one step added. Leaving the `with` block of the stream ends the request, also in the middle.
"""

import sys

from engine import LLM, SamplingParams

arguments = sys.argv[1:]
prompt = arguments[0] if arguments else "Once upon a time"
model = arguments[1] if len(arguments) > 1 else None  # None opens the bundled model

with LLM(model) as llm, llm.stream(prompt, SamplingParams(max_tokens=60, seed=1)) as stream:
    print(prompt, end="")
    for chunk in stream:
        print(chunk.text, end="", flush=True)
    result = stream.result()
print(f"\n[{result.finish_reason}: {result.stats.output_tokens} tokens, {result.stats.decode_tok_s:.0f} tok/s]")
