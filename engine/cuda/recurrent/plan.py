"""What every kind of recurrent layer states before its kernels are built: shapes of states, and build jobs.

Needs no GPU. Must not know of models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod

Job = tuple[tuple[str, ...], dict[str, object]]
"""Kernel files and defines, for compiler.prebuild."""


class StateShape(ABC):
    """What the kernels of a layer are built for. Shapes are hashable and equal where kernels are the same."""

    @property
    @abstractmethod
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """One row of each array of states, float32."""

    @property
    def state_bytes(self) -> int:
        """Bytes of one row of all of them."""
        return sum(4 * prod(shape) for shape in self.state_shapes)

    @abstractmethod
    def build_jobs(self) -> list[Job]:
        """The kernels of the layer."""
