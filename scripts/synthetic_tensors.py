"""A tensor of a synthetic model, as scripts/synthetic_models.py lists them."""

import math
from dataclasses import dataclass

import numpy as np

from engine.gguf import GGMLType, row_bytes


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: numpy-order shape, and the standard deviation (or the exact values) of its elements."""

    name: str
    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0
    values: np.ndarray | None = None
    layer: int = -1
    type: GGMLType = GGMLType.F32

    @property
    def n_bytes(self) -> int:
        """Packed size."""
        return math.prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])
