"""Drive the engine from a loop of your own: requests arrive, get tokens and are cancelled between steps.

    python examples/own_step_loop.py [model.gguf]

This is what a server does. Each step feeds all running sequences once and returns what they got.
"""

import sys

from engine import LLM, EngineError, SamplingParams

arrivals = {0: "Once upon a time", 3: "The old king", 6: "In the forest there lived"}
"""Prompts by the number of the step before which they arrive."""
GIVE_UP_AFTER = 10
"""Tokens after which the second request's client goes away."""

with LLM(sys.argv[1] if len(sys.argv) > 1 else None) as llm:
    texts: dict[int, str] = {}
    n_tokens: dict[int, int] = {}
    running: set[int] = set()
    number = 0
    while running or arrivals:
        if number in arrivals:
            prompt = arrivals.pop(number)
            request_id = llm.add_request(prompt, SamplingParams(max_tokens=25, seed=number))
            texts[request_id], n_tokens[request_id] = prompt, 0
            running.add(request_id)
        try:
            chunks = llm.step()
        except EngineError as error:  # one request failed; the others go on
            running.discard(getattr(error, "request_id", -1))
            print("failed:", error)
            continue
        for chunk in chunks:
            texts[chunk.request_id] += chunk.text
            n_tokens[chunk.request_id] += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                running.discard(chunk.request_id)
                print(f"step {number}: request {chunk.request_id} [{chunk.finish_reason}] {texts[chunk.request_id]}")
            elif n_tokens[chunk.request_id] == GIVE_UP_AFTER and texts[chunk.request_id].startswith("The old king"):
                llm.cancel(chunk.request_id)  # its last chunk comes with the next step
        number += 1
