"""The calls of LLM for asyncio: a thread that steps the model, and the way of its news to event loops."""
