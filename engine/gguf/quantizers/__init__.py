"""Numbers to packed blocks, and whole files written again with other tensor types. Models are opened without it."""
