"""Weights of an indexer (IndexerConfig)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.rope import RopeTable
from engine.model.weights.matrices import Float32Array, Linear, Norm


@dataclass(frozen=True, eq=False)
class IndexerWeights:
    """Weights of IndexerConfig, with I heads of Di numbers.

    q (I · Di, D), or (I · Di, q_rank) where it reads the low-rank query of latent attention; k (Di, D). q_norm and
    k_norm act on Di numbers; q_norm is None where queries are not normalized. proj (I, D) gives the heads' weights, or
    is None. rope is None where nothing is rotated. gate (Di, D) and ape (block, Di) float32 weigh the keys of a block.
    """

    q: Linear
    k: Linear
    k_norm: Norm
    q_norm: Norm | None
    proj: Linear | None
    rope: RopeTable | None
    gate: Linear | None = None
    ape: Float32Array | None = None

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return tuple(one for one in (self.q, self.k, self.proj, self.gate) if one is not None)
