"""Attention, RoPE with cache append, and the paged key-value cache."""
