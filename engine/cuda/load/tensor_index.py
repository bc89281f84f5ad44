"""Finds the linear maps of a loaded model by the names of their tensors, and counts what else it has.

Must not know what they are for.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from engine.model.rope import RopeTable
from engine.model.weights import ExpertLinear, Linear, ModelWeights, Weight


class TensorIndex:
    """Every Linear and ExpertLinear of a model by the name of its weight, ranges of rows included."""

    def __init__(self, weights: ModelWeights) -> None:
        self._found: dict[str, Linear | ExpertLinear] = {}
        self._vectors: dict[int, np.ndarray] = {}
        self._walk(weights)

    @property
    def vector_elements(self) -> int:
        """Numbers in norms, biases and the like: everything of the file that is no matrix."""
        return sum(int(vector.size) for vector in self._vectors.values())

    def linear(self, tensor: str, expert: int | None = None) -> Linear:
        """A linear map; with `expert` one of a stack."""
        found = self._found[tensor]
        if isinstance(found, ExpertLinear):
            assert expert is not None, f"{tensor} is a stack"
            return found.expert(expert)
        return found

    def stack(self, tensor: str) -> ExpertLinear:
        """All maps of a stack."""
        found = self._found[tensor]
        assert isinstance(found, ExpertLinear)
        return found

    def _walk(self, part: Any) -> None:
        if isinstance(part, (Linear, ExpertLinear)):
            self._found[part.weight.name] = part
        if isinstance(part, np.ndarray):
            self._vectors[id(part)] = part
        elif isinstance(part, (Weight, RopeTable)):
            return
        elif isinstance(part, tuple):
            for one in part:
                self._walk(one)
        elif is_dataclass(part):
            for field in fields(part):
                self._walk(getattr(part, field.name))
