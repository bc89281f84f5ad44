"""Attention of a model's layers, from metadata: the layers, and what several of them read in files of its own."""

from engine.model.reading.attention.layers import read_attention

__all__ = ["read_attention"]
