"""Weights of a table of n-grams (NgramConfig)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.weights.matrices import Float32Array, Linear, Norm, Weight


@dataclass(frozen=True, eq=False)
class NgramWeights:
    """Weights of NgramConfig, with E = (N - 1) · G · P.

    table (rows, P); key (S · D, E), value (D, E); the norms' weights are (S, D), conv1d (S · D, W) float32.
    """

    table: Weight
    key: Linear
    value: Linear
    norm_key: Norm
    norm_query: Norm
    norm_conv: Norm
    conv1d: Float32Array

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return self.key, self.value
