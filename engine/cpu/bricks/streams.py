"""The residual stream beside the parts of a layer, in plain numpy: what AltUpConfig and LayerConfig say of it.

Letters: T tokens, A vectors of a token, D width, P numbers of a layer's own vector, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.cpu.reference import Float32Array, gelu
from engine.gguf.quants import dequantize
from engine.model.batch import Int32Array
from engine.model.config import AltUpConfig, ModelConfig
from engine.model.weights import (
    LaurelWeights,
    LayerInputWeights,
    Linear,
    ModelWeights,
    Norm,
    PerLayerWeights,
    SpreadWeights,
    StreamWeights,
)

HALF = np.float32(1.0 / math.sqrt(2.0))
"""What sums of two terms of equal size are multiplied by."""


@dataclass(frozen=True)
class Streams:
    """The functions of one device and one model.

    Attributes:
        linear: a projection of (T, M), in an array of the caller's own.
        normalize: a norm over the last axis; None leaves the array as it is.
        config: the model.
        weights: its weights.
    """

    linear: Callable[[Linear, Float32Array], Float32Array]
    normalize: Callable[[Float32Array, Norm | None], Float32Array]
    config: ModelConfig
    weights: ModelWeights

    def layer_inputs(self, weights: PerLayerWeights, x: Float32Array, token_ids: Int32Array) -> Float32Array:
        """ModelConfig.per_layer_width: token vectors (T, D) to (T, L, P)."""
        width = self.config.per_layer_width
        stored = dequantize(weights.token_embd.raw[token_ids], weights.token_embd.type)
        stored = stored.reshape(len(x), -1, width) * np.float32(math.sqrt(width))
        projected = self.linear(weights.model_proj, x)
        projected *= np.float32(1.0 / math.sqrt(self.config.width))
        total: Float32Array = self.normalize(projected.reshape(stored.shape), weights.proj_norm) + stored
        total *= HALF
        return total

    def add_layer_input(self, weights: LayerInputWeights, x: Float32Array, own: Float32Array) -> Float32Array:
        """What a layer's own vector (T, P) adds to x (T, D)."""
        h = gelu(self.linear(weights.inp_gate, x))
        h *= own
        return self.normalize(self.linear(weights.proj, h), weights.post_norm)

    def laurel(self, weights: LaurelWeights, normed: Float32Array, y: Float32Array) -> Float32Array:
        """LayerConfig.laurel_rank: of the mixer's result y (T, D) and its normalized input."""
        low = self.linear(weights.right, self.linear(weights.left, normed))
        total = self.normalize(low, weights.post_norm) + normed
        return (y + total) * HALF

    def spread(self, weights: SpreadWeights, config: AltUpConfig, x: Float32Array) -> Float32Array:
        """Token vectors (T, D) to streams (T, A, D)."""
        others = (self.linear(weights.proj.expert(i), x) for i in range(config.count - 1))
        return np.stack([x, *(_as_long_as(other, x) for other in others)], axis=1)

    def merge(self, weights: SpreadWeights, config: AltUpConfig, x: Float32Array) -> Float32Array:
        """Streams (T, A, D) to the vectors (T, D) that the head reads."""
        total, target = x[:, 0].copy(), x[:, config.active]
        for i in range(config.count - 1):
            total += _as_long_as(self.linear(weights.unembd_proj.expert(i), np.ascontiguousarray(x[:, i + 1])), target)
        return total * np.float32(1.0 / config.count)

    def predict(self, weights: StreamWeights, config: AltUpConfig, x: Float32Array) -> Float32Array:
        """AltUpConfig, step 1: streams before a layer (T, A, D) to predictions (T, A, D)."""
        coefficients = self.linear(weights.predict, self._modalities(weights, x[:, config.active]))
        predicted: Float32Array = np.matmul(coefficients.reshape(-1, config.count, config.count), x)
        predicted += x
        return predicted

    def correct(
        self, weights: StreamWeights, config: AltUpConfig, predicted: Float32Array, made: Float32Array
    ) -> Float32Array:
        """AltUpConfig, step 3: predictions (T, A, D) and what the layer made (T, D) to streams (T, A, D)."""
        factors = self.linear(weights.correct, self._modalities(weights, made)) + np.float32(1.0)
        innovation = made - predicted[:, config.active]
        return innovation[:, None] * factors[..., None] + predicted

    def _modalities(self, weights: StreamWeights, x: Float32Array) -> Float32Array:
        """(T, D) to the numbers (T, A) that coefficients are made of."""
        normed = self.normalize(np.ascontiguousarray(x), weights.router_norm) * np.float32(1.0 / self.config.width)
        return np.tanh(self.linear(weights.router, normed))


def _as_long_as(x: Float32Array, target: Float32Array) -> Float32Array:
    """x scaled row by row to the Euclidean length of target, both (T, D)."""
    return x * _length(target) / _length(x)


def _length(x: Float32Array) -> Float32Array:
    """(T, 1) Euclidean lengths of rows."""
    return np.sqrt(np.add.reduce(x * x, axis=-1, keepdims=True))
