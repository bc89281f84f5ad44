"""Find the texts that are nearest to a question, by their embeddings.

    python examples/search.py [model.gguf] "a question"

The bundled model was not made for it and shows only how it is done; docs/embeddings.md names models that were, and what
they want before questions and texts (`instruction`).
"""

import sys

from engine import LLM

texts = ["The fox ran into the wood.", "The king had three daughters.", "The ship sailed over the sea."]
*model, question = sys.argv[1:] or ["Where did the fox go?"]

with LLM(*model[:1]) as llm:
    cosines = llm.embed(texts) @ llm.embed(question)[0]  # vectors have length 1
    for place in cosines.argsort()[::-1]:
        print(f"{cosines[place]:.3f} {texts[place]}")
