"""Weights of an indexer."""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.matrices import Linear, Norm
from engine.model.rope import RopeTable


@dataclass(frozen=True, eq=False)
class IndexerWeights:
    """Weights of IndexerConfig, with I heads of Di numbers.

    q (I · Di, D), or (I · Di, q_rank) where it reads the low-rank query of latent attention; k (Di, D). q_norm and
    k_norm act on Di numbers; q_norm is None where queries are not normalized. proj (I, D) gives the heads' weights, or
    is None. rope is None where nothing is rotated.
    """

    q: Linear
    k: Linear
    k_norm: Norm
    q_norm: Norm | None
    proj: Linear | None
    rope: RopeTable | None

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return (self.q, self.k) if self.proj is None else (self.q, self.k, self.proj)
