"""The public calls: LLM, streams, perplexity and speed measurements."""
