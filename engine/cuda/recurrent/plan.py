"""What every kind of recurrent layer states before its kernels are built: shapes of states, and build jobs.

Needs no GPU. Must not know of models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod

Job = tuple[tuple[str, ...], dict[str, object]]
"""Kernel files and defines, for compiler.prebuild."""


CHUNK_ARCH = 80
"""Prompts go in chunks from this compute capability on: tensor cores that read TF32."""

RECORD, PAIRED_RECORD = 40, 64
"""Floats that chunks of prompts keep of a token and head, and where two vectors a token enter the memory;
chunk_walk.cuh has the same numbers."""

WALK_THREADS, WALK_VALUES = 128, 32
"""Of a block of a walk over chunks: threads, and the values or channels of a head."""


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

    @property
    def chunk_width(self) -> int:
        """Floats that prompts in chunks take for a token between their kernels; 0 where they go token after token."""
        return 0

    @abstractmethod
    def build_jobs(self) -> list[Job]:
        """The kernels of the layer."""
