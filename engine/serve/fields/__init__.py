"""Bodies of requests: which fields they may have, and what of the engine each becomes."""
