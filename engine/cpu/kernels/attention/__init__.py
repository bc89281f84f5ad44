"""Attention over a packed cache: the kernel (`loop`, of `item`, `scores`, `values`), and `attend`, for callers."""
