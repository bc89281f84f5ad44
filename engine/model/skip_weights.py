"""Weights of a residual connection that is more than a sum: of one part of a layer, or of the head."""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.matrices import Linear, Norm


@dataclass(frozen=True, eq=False)
class NormedSkipWeights:
    """Weights of NormedSkip: the norm before the part."""

    norm: Norm

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return ()


@dataclass(frozen=True, eq=False)
class BankedSkipWeights:
    """Weights of BankedSkip: a norm whose weight (D,) are the scores; `banks`: the part banks the running sum."""

    score: Norm
    banks: bool = False

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return ()


@dataclass(frozen=True, eq=False)
class HyperSkipWeights:
    """Weights of HyperSkip.

    norm's weight is (S, D); down (rank, S · D), up (S · D, rank), inject (S, S · D), or None for the head.
    """

    norm: Norm
    down: Linear
    up: Linear
    inject: Linear | None = None

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return (self.down, self.up) if self.inject is None else (self.down, self.up, self.inject)


SkipWeights = NormedSkipWeights | BankedSkipWeights | HyperSkipWeights
"""One class per class of engine.model.skip_config."""
