"""The bricks through compiled kernels: what CpuOps computes, with the numpy between the products compiled as well.

Whether steps run at once or are recorded is up to the `Steps` at hand; the order of steps is written down here alone.
"""

from __future__ import annotations

import numpy as np

from engine.cpu.integer import IntegerWeights
from engine.cpu.kv_cache import KVCache
from engine.cpu.ops import CpuOps, Float32Array
from engine.cpu.steps import Angles, Immediate, Pages, Steps
from engine.cpu.threads import ThreadPool
from engine.model.batch import Batch, Span
from engine.model.config import FfnConfig
from engine.model.rope import RopeTable
from engine.model.weights import FfnWeights, LayerWeights, Linear, ModelWeights, Norm, Weight


class FastOps(CpuOps):
    """Implements `engine.model.ops.Ops` by compiled steps.

    Attributes:
        steps: who carries them out; exchanged while a program is recorded.

    Args:
        integer: the weights to be multiplied in integers; None keeps everything in float32.
    """

    def __init__(
        self, weights: ModelWeights, cache: KVCache, pool: ThreadPool, integer: IntegerWeights | None = None
    ) -> None:
        super().__init__(weights, cache, self._multiply)
        self.steps: Steps = Immediate(pool, integer)
        self._turns: dict[RopeTable, Angles] = {}

    def begin(self, batch: Batch) -> None:
        """See Ops.begin."""
        super().begin(batch)
        self._turns = {}

    def embed(self, batch: Batch) -> Float32Array:
        """See Ops.embed."""
        return self.steps.embed("x", self._weights.token_embd, batch.token_ids)

    def attn_qkv(self, layer: LayerWeights, x: Float32Array) -> Float32Array:
        """See Ops.attn_qkv."""
        steps, config, weights = self.steps, layer.config.attention, layer.attention
        normed = steps.normalize("normed", x, layer.attn_norm)
        steps.join()
        q = steps.linear("q", normed, weights.q).reshape(-1, config.n_heads, config.key_width)
        k = steps.linear("k", normed, weights.k).reshape(-1, config.n_kv_heads, config.key_width)
        v = steps.linear("v", normed, weights.v).reshape(-1, config.n_kv_heads, config.value_width)
        steps.join()
        if weights.q_norm is not None or weights.k_norm is not None:
            if weights.q_norm is not None:
                q = steps.normalize("q_normed", q, weights.q_norm)
            if weights.k_norm is not None:
                k = steps.normalize("k_normed", k, weights.k_norm)
            steps.join()
        angles = None if weights.rope is None else self._angles_of(weights.rope)
        factors = None
        if config.temperature is not None:
            factors = steps.factors(config.temperature, self._batch.positions)
        for span in self._batch.spans:
            keys, values = self._pages(layer, span)
            if angles is not None or factors is not None:
                steps.rotate_store(q, span, angles, keys, factors=factors, store=False)
            steps.rotate_store(k, span, angles, keys)
            steps.rotate_store(v, span, None, values)
        steps.join()
        return q

    def attention(self, layer: LayerWeights, q: Float32Array) -> Float32Array:
        """See Ops.attention."""
        config = layer.config.attention
        out = self.steps.empty("attended", (len(q), config.n_heads * config.value_width))
        for span in self._batch.spans:
            self.steps.attend(out, q, span, self._pages(layer, span), config)
        self.steps.join()
        return out

    def attn_output(self, layer: LayerWeights, a: Float32Array, x: Float32Array) -> Float32Array:
        """See Ops.attn_output."""
        y = self.steps.linear("x_attended", a, layer.attention.output, residual=x)
        self.steps.join()
        return y

    def ffn_down(self, layer: LayerWeights, h: Float32Array, x: Float32Array) -> Float32Array:
        """See Ops.ffn_down."""
        assert layer.ffn is not None
        y = self.steps.linear("x", h, layer.ffn.down, residual=x)
        self.steps.join()
        return y

    def head_rows(self, x: Float32Array) -> Float32Array:
        """See CpuOps.head_rows."""
        normed = self._normalize(x, self._weights.output_norm)
        logits = self.steps.linear("logits", normed, self._weights.output)
        self.steps.join()
        return logits

    def _gate_up(self, weights: FfnWeights, config: FfnConfig, normed: Float32Array) -> Float32Array:
        steps = self.steps
        up = steps.linear("up", normed, weights.up)
        gate = None if weights.gate is None else steps.linear("gate", normed, weights.gate)
        steps.join()
        h = steps.gate(up, None, config.activation) if gate is None else steps.gate(gate, up, config.activation)
        steps.join()
        return h

    def _normalize(self, x: Float32Array, norm: Norm) -> Float32Array:
        normed = self.steps.normalize("normed", np.ascontiguousarray(x), norm)
        self.steps.join()
        return normed

    def _linear(self, linear: Linear, x: Float32Array) -> Float32Array:
        y = self.steps.linear("y", x, linear)
        self.steps.join()
        return y

    def _multiply(self, x: Float32Array, weight: Weight) -> Float32Array:
        return self._linear(Linear(weight), x)

    def _pages(self, layer: LayerWeights, span: Span) -> tuple[Pages, Pages]:
        table = self._cache.tables[span.slot]
        keys, values = self._cache.arrays(layer.index)
        return Pages(keys, table), Pages(values, table)

    def _angles_of(self, rope: RopeTable) -> Angles:
        """The angles of this step's positions, made once per step and kind of layer."""
        if rope not in self._turns:
            self._turns[rope] = self.steps.angles(rope, self._batch.positions)
        return self._turns[rope]
