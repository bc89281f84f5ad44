"""Attention over a window of positions and compressed blocks of all earlier ones (DeepSeek V4)."""
