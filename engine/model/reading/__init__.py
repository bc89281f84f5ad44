"""From an architecture's declaration and a file's metadata to a ModelConfig: one module per part of the model."""

from engine.model.reading.model import read_config

__all__ = ["read_config"]
