"""Answer lines from standard input in a conversation that remembers what was said.

    python examples/chat.py [model.gguf]

A model with a chat template answers in its own format. The bundled model has none, so it gets a plain one: it
continues the story that the lines tell.
"""

import sys

from engine import LLM, SamplingParams

STORY = "{{ messages | map(attribute='content') | map('trim') | join(' ') }}"

model = sys.argv[1] if len(sys.argv) > 1 else None
messages: list[dict[str, str]] = []

with LLM(model, chat_template=None if model else STORY) as llm:
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        with llm.stream_chat(messages, SamplingParams(max_tokens=40, seed=len(messages))) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
            answer = stream.result()
        print()
        # The pages of the conversation so far stay in the cache: the next turn computes only what is new.
        messages.append({"role": "assistant", "content": answer.text})
