"""Opening a model: what it needs, device weights, buffers and the memory plan."""
