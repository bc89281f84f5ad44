"""What a model costs in memory at a given context."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a running model takes.

    Attributes:
        weights_bytes: tensors; on the CPU these are mapped pages of the file, not copies.
        kv_bytes: the cache with every slot filled to the context length (the CPU takes it as it fills).
        scratch_bytes: upper bound of activations and temporary arrays.
        kv_bytes_per_token: cache one token of one sequence takes.
        repacked_bytes: on the CPU, the copy of the weights in the order of the kernels, if there is one.
    """

    weights_bytes: int
    kv_bytes: int
    scratch_bytes: int
    kv_bytes_per_token: int
    repacked_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Everything together."""
        return self.weights_bytes + self.repacked_bytes + self.kv_bytes + self.scratch_bytes
