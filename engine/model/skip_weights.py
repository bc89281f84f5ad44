"""Weights of a residual connection that is more than a sum: of one part of a layer, or of the head."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.model.matrices import Float32Array, Linear, Norm


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


class StackPlace(Enum):
    """What a part does with the states of CycledSkip beside the stream of its stack."""

    INSIDE = "inside"
    FIRST = "first"  # it reads the sum of both
    LAST_LOW = "last_low"  # it replaces the low one
    LAST_HIGH = "last_high"
    HEAD = "head"  # reads the high one


@dataclass(frozen=True, eq=False)
class CycledSkipWeights:
    """The place of a part in CycledSkip, and the norm behind a stack; None behind the last one, where the head's is."""

    place: StackPlace
    norm: Norm | None = None

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return ()


SkipWeights = NormedSkipWeights | BankedSkipWeights | HyperSkipWeights | GatedSkipWeights | CycledSkipWeights
"""One class per class of engine.model.skip_config."""
