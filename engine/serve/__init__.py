"""The HTTP server: requests to the engine's calls, chunks to events. Only the command `serve` loads it."""
