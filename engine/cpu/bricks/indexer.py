"""Indexers on the CPU: which positions a query attends to (IndexerConfig), and attention over these alone.

Every query is scored and attended by itself, in the same order of operations whatever else is in the step, so that its
row has the same bits in any batch. Plain numpy; no caches, but for a function that reads the indexer's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from engine.cpu import reference
from engine.cpu.reference import CacheArray, Float32Array
from engine.model.batch import Span
from engine.model.config import AttentionConfig, IndexerConfig, IndexerKind
from engine.model.weights import IndexerWeights, Linear

Positions = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Choices:
    """What the queries of one span attend to.

    Attributes:
        n_all: first rows of the span that attend to all positions up to their own.
        chosen: for each further row ascending positions: one array for all heads, or one per key/value head.
    """

    n_all: int
    chosen: tuple[tuple[Positions, ...], ...]


@dataclass(frozen=True, eq=False)
class Queries:
    """The indexer's queries q (T, I, Di), and the weights (T, I) of its heads where it has any."""

    q: Float32Array
    weights: Float32Array | None


class Indexer:
    """The indexer of one layer.

    Args:
        config: what it computes.
        weights: its weights.
        linear: a projection of (T, M), in an array of the caller's own.
    """

    def __init__(
        self, config: IndexerConfig, weights: IndexerWeights, linear: Callable[[Linear, Float32Array], Float32Array]
    ) -> None:
        self._config = config
        self._weights = weights
        self._linear = linear

    def inputs(
        self, normed: Float32Array, latent: Float32Array | None, positions: npt.NDArray[np.int32]
    ) -> tuple[Queries, Float32Array]:
        """Queries, and the keys (T, Di) to be cached.

        Args:
            normed: (T, D) normalized inputs of the layer.
            latent: (T, q_rank) normalized low-rank queries, where attention is latent.
            positions: (T,) of the rows.
        """
        config, weights = self._config, self._weights
        q = self._linear(weights.q, normed if latent is None else latent)
        q = q.reshape(len(normed), config.heads, config.width)
        if weights.q_norm is not None:
            q = reference.normalize(q, weights.q_norm)
        q, keys = self._rotate(q, positions), self._linear(weights.k, normed)
        if config.kind is not IndexerKind.POOLED:
            keys = self._rotate(reference.normalize(keys, weights.k_norm)[:, None], positions)[:, 0]
        if weights.proj is None:
            return Queries(q, None), keys
        if weights.gate is not None:
            keys = np.concatenate((keys, self._linear(weights.gate, normed)), axis=1)
        factors = self._linear(weights.proj, normed)
        factors *= np.float32((config.heads * config.width) ** -0.5)
        return Queries(q, factors), keys

    def choose(self, queries: Queries, span: Span, cached: Callable[[], CacheArray]) -> Choices:
        """The positions for every row of a span.

        Args:
            queries: of the whole step.
            span: the rows.
            cached: gives the keys (n_total, Di) of the sequence, those of the span's rows included.
        """
        n_all = min(max(self._config.all_chosen - span.n_past, 0), span.n_rows)
        if n_all == span.n_rows:
            return Choices(n_all, ())
        keys = reference.widen(cached())
        if self._config.kind is IndexerKind.POOLED:
            keys = self._pool(keys)
        if self._config.kind is IndexerKind.GATED_POOLS:
            keys = self._pool_by_gates(keys)
        chosen = []
        for row in range(n_all, span.n_rows):
            at = span.row + row
            weights = None if queries.weights is None else queries.weights[at]
            chosen.append(self._choose_row(queries.q[at], weights, keys, span.n_past + row + 1))
        return Choices(n_all, tuple(chosen))

    def _choose_row(
        self, q: Float32Array, weights: Float32Array | None, keys: Float32Array, n_seen: int
    ) -> tuple[Positions, ...]:
        """The positions for q (I, Di), which sees the first n_seen."""
        config = self._config
        if config.kind is IndexerKind.TOKENS:
            scores = np.maximum(q @ keys[:n_seen].T, np.float32(0.0))
            assert weights is not None
            return (best(weights @ scores, config.top_k),)
        if config.kind in (IndexerKind.POOLED, IndexerKind.GATED_POOLS):
            n_full = n_seen // config.block
            scores = np.maximum(q @ keys[:n_full].T, np.float32(0.0))
            summed = np.add.reduce(scores, axis=0) if weights is None else weights @ scores
            blocks = best(summed, config.top_k // config.block)
            tail = np.arange(n_full * config.block, n_seen)
            return (np.concatenate((_expand(blocks, config.block), tail)),)
        by_block = _highest(q @ keys[:n_seen].T, config.block)
        by_block[:, max(0, by_block.shape[1] - config.local) :] = np.inf
        expanded = (_expand(best(scores, config.top_k), config.block) for scores in by_block)
        return tuple(positions[positions < n_seen] for positions in expanded)

    def _pool(self, keys: Float32Array) -> Float32Array:
        """Keys (B, Di) of the full blocks of keys (T, Di)."""
        block, n_full = self._config.block, len(keys) // self._config.block
        grouped = keys[: n_full * block].reshape(n_full, block, -1)
        mean = grouped[:, 0].copy()
        for place in range(1, block):
            mean += grouped[:, place]
        mean /= np.float32(block)
        first = np.arange(n_full, dtype=np.int32) * np.int32(block)
        return self._rotate(reference.normalize(mean, self._weights.k_norm)[:, None], first)[:, 0]

    def _pool_by_gates(self, cached: Float32Array) -> Float32Array:
        """Keys (B, Di) of the full blocks of keys and gates (T, 2 · Di)."""
        block, width, ape = self._config.block, self._config.width, self._weights.ape
        assert ape is not None
        n_full = len(cached) // block
        keys, gates = np.split(cached[: n_full * block].reshape(n_full, block, 2 * width), 2, axis=2)
        return pool_by_gates(keys, gates + ape)

    def _rotate(self, x: Float32Array, positions: npt.NDArray[np.int32]) -> Float32Array:
        """Rotate x (T, heads, Di) in place."""
        rope = self._weights.rope
        if rope is not None:
            first = self._config.width - rope.n_rot if self._config.rotated_last else 0
            reference.rotate(x[..., first:], *rope.cos_sin(positions), rope.style)
        return x


def pool_by_gates(values: Float32Array, gates: Float32Array) -> Float32Array:
    """Sums (B, W) over the positions of blocks: values (B, n, W) weighted by the softmax of gates (B, n, W) over n."""
    shares = np.ascontiguousarray(gates.transpose(0, 2, 1))
    reference.softmax(shares)
    pooled: Float32Array = values[:, 0] * shares[..., 0]
    for place in range(1, values.shape[1]):
        pooled += values[:, place] * shares[..., place]
    return pooled


def best(scores: Float32Array, count: int) -> Positions:
    """Ascending indices of the `count` highest of scores (n,), of equal ones the first; NaN counts as lowest."""
    if count >= len(scores):
        return np.arange(len(scores))
    scores = np.where(np.isnan(scores), np.float32(-np.inf), scores)
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > least)
    return np.sort(np.concatenate((above, np.flatnonzero(scores == least)[: count - len(above)])))


def attend_chosen(
    q: Float32Array,
    keys: CacheArray,
    values: CacheArray,
    attention: AttentionConfig,
    chosen: tuple[Positions, ...],
    sinks: Float32Array | None,
) -> Float32Array:
    """Attention of one query over chosen positions.

    Args:
        q: (H, Hd).
        keys: (K, T, Hd) of the sequence.
        values: (K, T, Hv).
        attention: scale and head counts; there is no window.
        chosen: positions for all heads, or for each key/value head.
        sinks: (H,) one more score of every head, or None.

    Returns:
        (H · Hv,) float32.
    """
    if len(chosen) == 1:
        at = chosen[0]
        row: Float32Array = reference.attend(q[None], keys[:, at], values[:, at], attention, len(at) - 1, sinks=sinks)[
            0
        ]
        return row
    group = attention.group
    one = replace(attention, n_heads=group, n_kv_heads=1)
    parts = []
    for head, at in enumerate(chosen):
        heads = slice(head * group, (head + 1) * group)
        own = None if sinks is None else sinks[heads]
        picked = keys[head][None, at], values[head][None, at]
        parts.append(reference.attend(q[None, heads], *picked, one, len(at) - 1, sinks=own)[0])
    out: Float32Array = np.concatenate(parts)
    return out


def _highest(scores: Float32Array, block: int) -> Float32Array:
    """The highest of every `block` consecutive scores: (I, n) to (I, blocks), of which the last may be shorter."""
    n_blocks = -(-scores.shape[1] // block)
    padded = np.full((len(scores), n_blocks * block), -np.inf, dtype=np.float32)
    padded[:, : scores.shape[1]] = scores
    highest: Float32Array = np.maximum.reduce(padded.reshape(len(scores), n_blocks, block), axis=2)
    return highest


def _expand(blocks: Positions, block: int) -> Positions:
    """All positions of these blocks."""
    positions: Positions = (blocks[:, None] * block + np.arange(block)).reshape(-1)
    return positions
