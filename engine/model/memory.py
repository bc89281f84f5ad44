"""What a model costs in memory at a given context."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a running model takes.

    Attributes:
        weights_bytes: tensors; on the CPU these are mapped pages of the file, not copies.
        kv_bytes: all pages of the cache (the CPU takes their memory as they fill).
        scratch_bytes: upper bound of activations and temporary arrays.
        kv_bytes_per_token: cache one token of one sequence takes.
        repacked_bytes: on the CPU, the copy of the weights in the order of the kernels, if there is one.
        state_bytes: states of recurrent layers, of all sequences and checkpoints.
        max_sequences: sequences that run side by side.
    """

    weights_bytes: int
    kv_bytes: int
    scratch_bytes: int
    kv_bytes_per_token: int
    repacked_bytes: int = 0
    state_bytes: int = 0
    max_sequences: int = 1

    @property
    def total_bytes(self) -> int:
        """Everything together."""
        return self.weights_bytes + self.repacked_bytes + self.kv_bytes + self.state_bytes + self.scratch_bytes
