"""Attention over a window and compressed blocks on the CPU (CompressedConfig).

Every query is attended by itself, in the same order of operations whatever else is in the step, so that its row has
the same bits in any batch. Plain numpy; no caches, but for functions that read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from engine.cpu import reference
from engine.cpu.bricks.indexer import best, pool_by_gates
from engine.cpu.reference import CacheArray, Float32Array
from engine.model.config import AttentionConfig, BlocksConfig, CompressedConfig
from engine.model.weights import AttentionWeights, BlockKeyWeights, CompressedWeights, Linear


@dataclass(frozen=True, eq=False)
class Projected:
    """What a step's inputs become.

    Attributes:
        q: (T, H, Hd).
        key: (T, 1, Hd).
        left: (T, position_width), what blocks are made of; None where the layer has none.
        index_q: (T, I, Di), the queries of the index, or None.
        index_weights: (T, I) of its heads.
    """

    q: Float32Array
    key: Float32Array
    left: Float32Array | None = None
    index_q: Float32Array | None = None
    index_weights: Float32Array | None = None


class Compressed:
    """The attention of one layer.

    Args:
        attention: what it computes.
        weights: its weights.
        linear: a projection of (T, M), in an array of the caller's own.
    """

    def __init__(
        self,
        attention: AttentionConfig,
        weights: AttentionWeights,
        linear: Callable[[Linear, Float32Array], Float32Array],
    ) -> None:
        assert attention.compressed is not None
        assert weights.compressed is not None
        assert weights.rope is not None
        self._attention = attention
        self._config: CompressedConfig = attention.compressed
        self._weights: CompressedWeights = weights.compressed
        self._rope, self._sinks = weights.rope, weights.sinks
        self._linear = linear

    def project(self, normed: Float32Array, positions: npt.NDArray[np.int32]) -> Projected:
        """Queries, and what is cached, of normalized inputs (T, D) at positions (T,)."""
        weights, rows = self._weights, len(normed)
        latent = reference.normalize(self._linear(weights.q_a, normed), weights.q_a_norm)
        q = self._linear(weights.q_b, latent).reshape(rows, self._attention.n_heads, -1)
        q = self._rotate(reference.normalize(q, weights.q_norm), positions)
        key = reference.normalize(self._linear(weights.kv, normed), weights.kv_norm)
        key = self._rotate(key[:, None], positions)
        blocks = self._config.blocks
        if blocks is None or weights.keys is None:
            return Projected(q, key)
        left = [self._left(weights.keys, normed, positions)]
        if blocks.index is None or weights.index is None:
            return Projected(q, key, np.concatenate(left, axis=1))
        left.append(self._left(weights.index.keys, normed, positions))
        index_q = self._linear(weights.index.q_b, latent).reshape(rows, blocks.index.heads, -1)
        factors = self._linear(weights.index.proj, normed)
        factors *= np.float32((blocks.index.heads * blocks.index.width) ** -0.5)
        return Projected(q, key, np.concatenate(left, axis=1), self._rotate(index_q, positions), factors)

    def block_keys(self, left: CacheArray, first: int) -> Float32Array:
        """Keys (B, W) of blocks from number `first` on, those of the index behind those of attention.

        Args:
            left: (T, position_width) of the positions of these blocks, and where blocks overlap of the block before,
                if there is one; perhaps of further positions, too few for a block.
            first: number of the first block.
        """
        blocks, weights = self._config.blocks, self._weights
        assert blocks is not None
        assert weights.keys is not None
        rows, keys = reference.widen(left), [weights.keys]
        keys += [] if weights.index is None else [weights.index.keys]
        made, start = [], 0
        for part in keys:
            stop = start + 2 * part.kv.weight.rows
            made.append(self._pool(part, blocks, rows[:, start:stop], first))
            start = stop
        return np.concatenate(made, axis=1)

    def attend(
        self, projected: Projected, row: int, position: int, keys: CacheArray, block_keys: CacheArray
    ) -> Float32Array:
        """Attention (H · Hd,) of one query that sees blocks.

        Args:
            projected: of the step.
            row: of the query in the step.
            position: of the query.
            keys: (1, T, Hd) of the sequence.
            block_keys: (B, W), of at least the blocks that end at or before the query.
        """
        attention, blocks = self._attention, self._config.blocks
        assert blocks is not None
        seen = block_keys[: (position + 1) // blocks.length]
        if blocks.index is not None:
            assert projected.index_q is not None
            assert projected.index_weights is not None
            own = np.ascontiguousarray(reference.widen(seen)[:, attention.key_width :])
            scores = np.maximum(projected.index_q[row] @ own.T, np.float32(0.0))
            seen = seen[best(projected.index_weights[row] @ scores, blocks.index.top_k)]
        begin = 0 if attention.window is None else max(0, position + 1 - attention.window)
        picked = np.concatenate((keys[:, begin : position + 1], seen[None, :, : attention.key_width]), axis=1)
        alone = replace(attention, window=None)
        q = projected.q[row][None]
        out: Float32Array = reference.attend(q, picked, picked, alone, picked.shape[1] - 1, sinks=self._sinks)[0]
        return out

    def output(self, attended: Float32Array, positions: npt.NDArray[np.int32]) -> Float32Array:
        """What attn_output reads, (T, G · output_rank), of what the heads give, (T, H · Hd); overwrites it."""
        heads = attended.reshape(len(attended), self._attention.n_heads, -1)
        groups = self._rotate(heads, positions, back=True).reshape(len(attended), self._config.groups, -1)
        made = (self._linear(one, groups[:, g].copy()) for g, one in enumerate(self._weights.output_a))
        return np.concatenate(list(made), axis=1)

    def _left(self, keys: BlockKeyWeights, normed: Float32Array, positions: npt.NDArray[np.int32]) -> Float32Array:
        gates = self._linear(keys.gate, normed)
        gates += keys.ape[positions % len(keys.ape)]
        return np.concatenate((self._linear(keys.kv, normed), gates), axis=1)

    def _pool(self, keys: BlockKeyWeights, blocks: BlocksConfig, rows: Float32Array, first: int) -> Float32Array:
        """Keys (B, W) of the full blocks of rows (T, 2 · c · W)."""
        if blocks.overlap and first == 0:  # nothing is before the first block
            before = np.zeros((blocks.length, rows.shape[1]), dtype=np.float32)
            before[:, rows.shape[1] // 2 :] = -np.inf
            rows = np.concatenate((before, rows))
        count = len(rows) // blocks.length
        values, gates = np.split(rows[: count * blocks.length].reshape(count, blocks.length, -1), 2, axis=2)
        if blocks.overlap:
            values, gates = _overlapped(values), _overlapped(gates)
        pooled = pool_by_gates(values, gates)
        begins = np.arange(first, first + len(pooled), dtype=np.int32) * np.int32(blocks.length)
        return self._rotate(reference.normalize(pooled, keys.norm)[:, None], begins)[:, 0]

    def _rotate(self, x: Float32Array, positions: npt.NDArray[np.int32], *, back: bool = False) -> Float32Array:
        """Rotate the last numbers of heads (T, heads, N) in place."""
        cos, sin = self._rope.cos_sin(positions)
        reference.rotate(x[..., x.shape[-1] - self._rope.n_rot :], cos, -sin if back else sin, self._rope.style)
        return x


def _overlapped(numbers: Float32Array) -> Float32Array:
    """(B + 1, n, 2 · W) to (B, 2 · n, W): the first half of a block's numbers joins the block behind it."""
    width = numbers.shape[2] // 2
    return np.concatenate((numbers[:-1, :, :width], numbers[1:, :, width:]), axis=1)
