"""What all bricks on the CPU share: the step at hand, projections, norms and angles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.cpu import reference
from engine.cpu.caches.model import KVCache
from engine.errors import InvalidRequestError
from engine.model.batch import Batch
from engine.model.config import ModelConfig, QkNorm
from engine.model.ops import LayerBricks
from engine.model.rope import RopeTable
from engine.model.weights import LayerWeights, Linear, ModelWeights, Norm, Weight

Float32Array = reference.Float32Array
Product = Callable[[Float32Array, Weight], Float32Array]
"""product(x (T, M), W (N, M)) -> x @ W.T (T, N) float32, straight from packed rows, in an array of the caller's own."""


class StepBricks(LayerBricks[LayerWeights]):
    """A model, its cache, and the step at hand, whose state is kept between bricks."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, cache: KVCache, product: Product) -> None:
        self._config = config
        self._weights = weights
        self._cache = cache
        self._product = product
        self._batch: Batch
        self._angles: dict[RopeTable, tuple[Float32Array, Float32Array]] = {}

    def begin(self, batch: Batch) -> None:
        """See Ops.begin."""
        ids = batch.token_ids.tolist()
        low, high = min(ids), max(ids)
        n_vocab = self._weights.token_embd.rows
        if low < 0 or high >= n_vocab:
            wrong = low if low < 0 else high
            raise InvalidRequestError(f"token id {wrong} is not in the vocabulary; allowed are 0 to {n_vocab - 1}")
        self._cache.reserve(batch.spans)
        self._batch = batch
        self._angles = {}

    def _add(self, layer: LayerWeights, part: Float32Array, norm: Norm | None, x: Float32Array | None) -> Float32Array:
        """x + residual_scale · norm(part), in an array of its own; `part` may be overwritten. None adds nothing."""
        y = self._normalize(part, norm)
        if layer.config.residual_scale != 1.0:
            y *= np.float32(layer.config.residual_scale)
        if x is not None:
            y += x
        return y

    def _normalize(self, x: Float32Array, norm: Norm | None) -> Float32Array:
        return x if norm is None else reference.normalize(x, norm)

    def _normalize_heads(self, x: Float32Array, norm: Norm | None, kind: QkNorm | None) -> Float32Array:
        return x if norm is None or kind is None else reference.normalize_heads(x, norm, kind)

    def _linear(self, linear: Linear, x: Float32Array) -> Float32Array:
        y = self._product(x, linear.weight)
        if linear.scale != 1.0:
            y *= np.float32(linear.scale)
        if linear.bias is not None:
            y += linear.bias
        return y

    def _cos_sin(self, rope: RopeTable) -> tuple[Float32Array, Float32Array]:
        """Angles' cos and sin of this step's positions, computed once per step and kind of layer."""
        if rope not in self._angles:
            self._angles[rope] = rope.cos_sin(self._batch.positions)
        return self._angles[rope]
