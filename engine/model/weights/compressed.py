"""Weights of attention over a window and compressed blocks (CompressedConfig)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.weights.matrices import Float32Array, Linear, Norm


@dataclass(frozen=True, eq=False)
class BlockKeyWeights:
    """What makes keys of W numbers of blocks: kv and gate (c · W, D), ape (B, c · W) float32, a norm of W numbers.

    c is 2 where blocks overlap, else 1.
    """

    kv: Linear
    gate: Linear
    ape: Float32Array
    norm: Norm


@dataclass(frozen=True, eq=False)
class BlockIndexWeights:
    """Weights of BlockIndexConfig: q_b (I · Di, R), proj (I, D), and what makes the keys of Di numbers."""

    q_b: Linear
    proj: Linear
    keys: BlockKeyWeights


@dataclass(frozen=True, eq=False)
class CompressedWeights:
    """Weights of CompressedConfig.

    q_a (R, D), q_a_norm (R,), q_b (H · Hd, R), q_norm without a weight, kv (Hd, D), kv_norm (Hd,); output_a: for each
    group (output_rank, H / G · Hd). keys and index are None where BlocksConfig, or its index, is.
    """

    q_a: Linear
    q_a_norm: Norm
    q_b: Linear
    q_norm: Norm
    kv: Linear
    kv_norm: Norm
    output_a: tuple[Linear, ...]
    keys: BlockKeyWeights | None
    index: BlockIndexWeights | None

    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        found = [self.q_a, self.q_b, self.kv, *self.output_a]
        for keys in (self.keys, None if self.index is None else self.index.keys):
            found += () if keys is None else (keys.kv, keys.gate)
        return (*found, *(() if self.index is None else (self.index.q_b, self.index.proj)))
