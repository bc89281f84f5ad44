"""The bricks of a forward pass on the CPU: plain numpy, with every matrix product handed to one function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.cpu import reference
from engine.cpu.kv_cache import KVCache
from engine.errors import InvalidRequestError
from engine.gguf.quants import dequantize
from engine.model.batch import Batch
from engine.model.config import FfnConfig, MoeConfig
from engine.model.rope import RopeTable
from engine.model.weights import FfnWeights, LayerWeights, Linear, ModelWeights, Norm, Weight

Float32Array = reference.Float32Array
Product = Callable[[Float32Array, Weight], Float32Array]
"""product(x (T, M), W (N, M)) -> x @ W.T (T, N) float32, straight from packed rows, in an array of the caller's own."""


class CpuOps:
    """Implements `engine.model.ops.Ops` over numpy arrays; the state of the step at hand is kept between bricks."""

    def __init__(self, weights: ModelWeights, cache: KVCache, product: Product) -> None:
        self._weights = weights
        self._cache = cache
        self._product = product
        self._batch: Batch
        self._angles: dict[RopeTable, tuple[Float32Array, Float32Array]] = {}

    def begin(self, batch: Batch) -> None:
        """See Ops.begin."""
        low, high = int(batch.token_ids.min()), int(batch.token_ids.max())
        n_vocab = self._weights.token_embd.rows
        if low < 0 or high >= n_vocab:
            wrong = low if low < 0 else high
            raise InvalidRequestError(f"token id {wrong} is not in the vocabulary; allowed are 0 to {n_vocab - 1}")
        self._cache.reserve(batch.spans)
        self._batch = batch
        self._angles = {}

    def embed(self, batch: Batch) -> Float32Array:
        """See Ops.embed."""
        table = self._weights.token_embd
        return dequantize(table.raw[batch.token_ids], table.type)

    def attn_qkv(self, layer: LayerWeights, x: Float32Array) -> Float32Array:
        """See Ops.attn_qkv."""
        attention, weights = layer.config.attention, layer.attention
        normed = self._normalize(x, layer.attn_norm)
        q = self._linear(weights.q, normed).reshape(-1, attention.n_heads, attention.key_width)
        k = self._linear(weights.k, normed).reshape(-1, attention.n_kv_heads, attention.key_width)
        v = self._linear(weights.v, normed).reshape(-1, attention.n_kv_heads, attention.value_width)
        if weights.q_norm is not None:
            q = self._normalize(q, weights.q_norm)
        if weights.k_norm is not None:
            k = self._normalize(k, weights.k_norm)
        if weights.rope is not None:
            cos, sin = self._cos_sin(weights.rope)
            reference.rotate(q, cos, sin, weights.rope.style)
            reference.rotate(k, cos, sin, weights.rope.style)
        if attention.temperature is not None:
            q *= reference.temperature_factors(self._batch.positions, attention.temperature)[:, None, None]
        for span in self._batch.spans:
            rows = slice(span.row, span.row + span.n_rows)
            self._cache.append(layer.index, span, k[rows], v[rows])
        return q

    def attention(self, layer: LayerWeights, q: Float32Array) -> Float32Array:
        """See Ops.attention."""
        attention = layer.config.attention
        parts = []
        for span in self._batch.spans:
            keys, values = self._cache.view(layer.index, span)
            parts.append(reference.attend(q[span.row : span.row + span.n_rows], keys, values, attention, span.n_past))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def attn_output(self, layer: LayerWeights, a: Float32Array, x: Float32Array) -> Float32Array:
        """See Ops.attn_output."""
        y = self._linear(layer.attention.output, a)
        y += x
        return y

    def ffn_gate_up(self, layer: LayerWeights, x: Float32Array) -> Float32Array:
        """See Ops.ffn_gate_up."""
        assert layer.ffn is not None
        assert isinstance(layer.config.ffn, FfnConfig)
        return self._gate_up(layer.ffn, layer.config.ffn, self._normalize(x, layer.ffn_norm))

    def ffn_down(self, layer: LayerWeights, h: Float32Array, x: Float32Array) -> Float32Array:
        """See Ops.ffn_down."""
        assert layer.ffn is not None
        y = self._linear(layer.ffn.down, h)
        y += x
        return y

    def ffn_moe(self, layer: LayerWeights, x: Float32Array) -> Float32Array:
        """See Ops.ffn_moe."""
        moe, config = layer.moe, layer.config.ffn
        assert moe is not None
        assert isinstance(config, MoeConfig)
        normed = self._normalize(x, layer.ffn_norm)
        chosen, weights = reference.route(self._linear(moe.router, normed), config)
        out = x.copy()
        # Expert by expert in ascending order, so that each expert's weights are read once and a token's sum does not
        # depend on what else is in the batch.
        for expert in np.unique(chosen):
            rows, place = np.nonzero(chosen == expert)
            parts = FfnWeights(moe.gate.expert(expert), moe.up.expert(expert), moe.down.expert(expert))
            h = self._gate_up(parts, config.expert, normed[rows])
            out[rows] += self._linear(parts.down, h) * weights[rows, place, None]
        if moe.shared is not None and config.shared is not None:
            y = self._linear(moe.shared.down, self._gate_up(moe.shared, config.shared, normed))
            if moe.shared_gate is not None:
                y *= reference.sigmoid(self._linear(moe.shared_gate, normed))
            out += y
        return out

    def head(self, x: Float32Array, batch: Batch) -> Float32Array:
        """See Ops.head."""
        return self.head_rows(x[batch.output_rows])

    def head_rows(self, x: Float32Array) -> Float32Array:
        """Final norm and output projection of the given rows: (R, D) to logits (R, V)."""
        return self._linear(self._weights.output, self._normalize(x, self._weights.output_norm))

    def _gate_up(self, weights: FfnWeights, config: FfnConfig, normed: Float32Array) -> Float32Array:
        up = self._linear(weights.up, normed)
        if weights.gate is None:
            return reference.activate(up, config.activation)
        h = reference.activate(self._linear(weights.gate, normed), config.activation)
        h *= up
        return h

    def _normalize(self, x: Float32Array, norm: Norm) -> Float32Array:
        return reference.normalize(x, norm)

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
