"""From a configuration and a file's tensors to ModelWeights: one module per part of the model."""

from engine.model.building.model import build_weights
from engine.model.building.tensors import TensorTable, listed

__all__ = ["TensorTable", "build_weights", "listed"]
