"""Weights of a residual connection that is more than a sum: of one part of a layer, or of the head."""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.weights.matrices import Float32Array, Linear, Norm


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


@dataclass(frozen=True, eq=False)
class GatedSkipWeights:
    """Weights of GatedSkip.

    norm has no weight; fn (2 · S, S · D), or (S, S · D) for the head; factor (the scales, repeated) and base float32,
    one number for each of its rows.
    """

    norm: Norm
    fn: Linear
    factor: Float32Array
    base: Float32Array

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return (self.fn,)


@dataclass(frozen=True, eq=False)
class MixedSkipWeights:
    """Weights of MixedSkip: as GatedSkipWeights, with R = 2 · S + S · S."""

    norm: Norm
    fn: Linear
    factor: Float32Array
    base: Float32Array

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return (self.fn,)


@dataclass(frozen=True, eq=False)
class MeanSkipWeights:
    """The head of MixedSkip that reads a mean and has no weights."""

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return ()


@dataclass(frozen=True, eq=False)
class StackSkipWeights:
    """What StackSkip needs to know of a part, or of the head, which has b's first values (D,).

    `begins`: r = a + b before the part. `ends`: r becomes b behind it, or where `high` a.
    """

    norm: Norm
    begins: bool = False
    ends: bool = False
    high: bool = False
    init: Float32Array | None = None

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return ()


SkipWeights = (
    NormedSkipWeights
    | BankedSkipWeights
    | HyperSkipWeights
    | GatedSkipWeights
    | MixedSkipWeights
    | MeanSkipWeights
    | StackSkipWeights
)
"""One class per class of config/skips.py, and one for a head without weights."""
