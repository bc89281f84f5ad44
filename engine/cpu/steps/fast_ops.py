"""The bricks through compiled kernels: what CpuOps computes, with the numpy between the products compiled as well.

The `Steps` in use decides whether steps run at once or are recorded; the order of steps is written here only.
What no kernel serves (clamping q, k and v; gates of attention; latent vectors on their way to q, k and v; indexers, and
attention over what they choose; softcap with linear biases; chunks of positions that are no whole pages; limits and
sparsity of gates; what layers do with the residual stream beside their
parts) is left to CpuOps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.cpu.bricks.base import Float32Array
from engine.cpu.bricks.ops import CpuOps
from engine.cpu.caches.model import KVCache
from engine.cpu.caches.rows import CacheRows
from engine.cpu.products.integer import IntegerWeights
from engine.cpu.steps.immediate import Immediate
from engine.cpu.steps.plain import can_attend, plain_gate, plain_output_gate, plain_recurrent
from engine.cpu.steps.protocol import Angles, StateRow, Steps
from engine.cpu.steps.recurrence import CompiledRecurrence
from engine.cpu.steps.recurrent_mixers import recur
from engine.cpu.threads import ThreadPool
from engine.model.batch import Batch, Span
from engine.model.config import FfnConfig, ModelConfig, QkNorm
from engine.model.rope import RopeTable
from engine.model.weights import CombinedWeights, FfnWeights, LayerWeights, Linear, ModelWeights, Norm, Weight


class FastOps(CpuOps):
    """Implements `engine.model.ops.Ops` by compiled steps.

    Attributes:
        steps: runs them; exchanged while a program is recorded.
        rounded: see below.

    Args:
        integer: the weights to be multiplied in integers; None keeps everything in float32.
        rounded: round activations to BF16 where weights are.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        cache: KVCache,
        pool: ThreadPool,
        integer: IntegerWeights | None = None,
        *,
        rounded: bool = False,
    ) -> None:
        super().__init__(config, weights, cache, self._multiply)
        self.rounded = rounded
        self._immediate = Immediate(pool, integer, rounded=rounded)
        self._recurrence = CompiledRecurrence(self._immediate)
        self.steps: Steps = self._immediate
        self._turns: dict[RopeTable, Angles] = {}
        self._rows: dict[int | None, CacheRows] = {}  # by the chunks of positions that a layer attends in
        self._states: npt.NDArray[np.int64] | None = None  # rows of states of the step at hand
        self._scaled: dict[Linear, Linear] = {}
        self._added = 0  # parts of layers that the step at hand has added to the residual stream
        self._zeros: dict[tuple[int, ...], Float32Array] = {}  # states that sequences begin with, by shape

    def settle(self) -> None:
        """See CpuOps.settle."""
        self.steps = self._immediate  # also where a recording was cut short

    def begin(self, batch: Batch) -> None:
        """See Ops.begin."""
        super().begin(batch)
        self._turns, self._rows, self._states = {}, {}, None

    def _embed_tokens(self, batch: Batch) -> Float32Array:
        self._added = 0
        x = self.steps.embed("x", self._weights.token_embd, batch, self._finish_embedding)
        if self._weights.embedding_norm is None:
            return x
        normed = self.steps.normalize("x_normed", x, self._weights.embedding_norm)
        self.steps.join()
        return normed

    def attn_qkv(self, layer: LayerWeights, x: Float32Array) -> Float32Array:
        """See LayerBricks.attn_qkv."""
        steps, config, weights = self.steps, layer.config.attention, layer.attention
        if not config.plain or not plain_output_gate(config) or config.clamp is not None:
            return super().attn_qkv(layer, x)
        normed = self._normalize(x, layer.attn_norm)
        gated = config.output_gate is not None  # in the query
        q, k, v = (
            None if linear is None else steps.linear(name, normed, linear).reshape(len(x), heads, width)
            for name, linear, heads, width in (
                ("q_gate" if gated else "q", weights.q, config.n_heads, config.key_width * (1 + gated)),
                ("k", weights.k, config.n_kv_heads, config.key_width),
                ("v", weights.v, config.n_kv_heads, config.value_width),
            )
        )
        assert q is not None
        steps.join()
        if gated:
            self._gate = steps.take_columns("query_gate", q, config.key_width, config.key_width)
            q = steps.take_columns("q", q, 0, config.key_width).reshape(len(x), config.n_heads, config.key_width)
            steps.join()
        angles = None if weights.rope is None else self._angles_of(weights.rope)
        rows, (keys, values) = self._rows_of(None), self._cache.arrays(layer.index)
        if config.qk_norm_after_rope and angles is not None:
            for part in (q, k):
                if part is not None:
                    steps.rotate_store(part, rows, angles, keys, store=False)
            steps.join()
            angles = None
        q = self._normalize_named("q_normed", q, weights.q_norm, config.qk_norm)
        if k is not None and v is not None:
            k = self._normalize_named("k_normed", k, weights.k_norm, config.qk_norm)
            v = self._normalize_named("v_normed", v, weights.v_norm, QkNorm.HEAD)
        steps.join()
        factors = None
        if config.temperature is not None:
            factors = steps.factors(config.temperature, self._batch.positions)
        if angles is not None or factors is not None:
            steps.rotate_store(q, rows, angles, keys, factors=factors, store=False)
        if k is not None and v is not None:
            steps.rotate_store(k, rows, angles, keys)
            steps.rotate_store(v, rows, None, values)
        steps.join()
        return q

    def attention(self, layer: LayerWeights, q: Float32Array) -> Float32Array:
        """See LayerBricks.attention."""
        config = layer.config.attention
        if config.indexer is not None or config.compressed is not None:
            return super().attention(layer, q)
        out = self.steps.empty("attended", (len(q), config.n_heads * config.value_width))
        if not can_attend(layer):
            for span in self._batch.spans:
                super()._attend(out, layer, q, span)
            return out
        if config.causal:
            cache = self._cache.arrays(layer.index)
            self.steps.attend(out, q, self._rows_of(config.chunk), cache, layer)
            self.steps.join()
            return out
        self._immediate.attend_texts(out, q, self._batch, self._cache.tables, self._cache.arrays(layer.index), layer)
        return out

    def _attend(self, out: Float32Array, layer: LayerWeights, q: Float32Array, span: Span) -> None:
        """See CpuOps._attend."""
        if not can_attend(layer):
            super()._attend(out, layer, q, span)
            return
        part, rows = slice(span.row, span.row + span.n_rows), self._rows_of(layer.config.attention.chunk)
        self.steps.attend(out[part], q[part], rows.part(span), self._cache.arrays(layer.index), layer)

    def _gated_values(self, layer: LayerWeights, a: Float32Array) -> Float32Array:
        config = layer.config.attention
        if config.output_gate is None or not config.plain or not plain_output_gate(config):
            return super()._gated_values(layer, a)
        gated = self.steps.gate(self._gate, a, None)
        self.steps.join()
        return gated

    def _mix_onto(self, layer: LayerWeights, h: Float32Array, x: Float32Array | None) -> Float32Array:
        weights = layer.recurrent
        if weights is None or not plain_recurrent(layer):
            return super()._mix_onto(layer, h, x)
        states = [self._state_rows(layer.index, number) for number in range(len(self._batch.spans))]
        normed = self._normalize(h, layer.attn_norm)
        y, last = recur(self.steps, layer.config.recurrent_part, weights, normed, self._batch.spans, states)
        if isinstance(layer.mixer, CombinedWeights):
            x = self.attn_output(layer, self.attention(layer, self.attn_qkv(layer, h)), x)
        return self._project_add(layer, y, last, layer.attn_post_norm, x)

    def _state_rows(self, layer: int, number: int) -> list[StateRow]:
        """A layer's state of one of the step's sequences, array by array."""
        if self._states is None:
            self._states = self.steps.state_rows(self._batch, self._cache.state_rows)
        arrays = self._cache.state_arrays(layer)
        for array in arrays:
            self._zeros.setdefault(array.shape[1:], np.zeros(array.shape[1:], np.float32))
        return [StateRow(array, self._zeros[array.shape[1:]], self._states[number]) for array in arrays]

    def attn_output(self, layer: LayerWeights, a: Float32Array, x: Float32Array | None) -> Float32Array:
        """See LayerBricks.attn_output."""
        a = self._values(layer, a)
        return self._project_add(layer, a, layer.attention.output, layer.attn_post_norm, x)

    def ffn_down(self, layer: LayerWeights, h: Float32Array, y: Float32Array | None) -> Float32Array:
        """See LayerBricks.ffn_down."""
        assert layer.ffn is not None
        return self._project_add(layer, h, layer.ffn.down, layer.ffn_post_norm, y)

    def head_rows(self, x: Float32Array) -> Float32Array:
        """See CpuOps.head_rows."""
        return self.finish_logits(self.head_products(x))

    def head_products(self, x: Float32Array) -> Float32Array:
        """head_rows() without the last scaling and capping."""
        normed = self._normalize(self._last(x), self._weights.output_norm)
        logits = self.steps.linear("logits", normed, self._weights.head)
        self.steps.join()
        return logits

    def _project_add(
        self, layer: LayerWeights, a: Float32Array, linear: Linear, norm: Norm | None, x: Float32Array | None
    ) -> Float32Array:
        """x + residual_scale · norm(linear · a); without x what is added alone."""
        steps, factor = self.steps, layer.config.residual_scale
        # Two buffers by turns: what is read is never written, nor what the feed-forward part of a parallel layer reads.
        self._added += 1
        name = "x" if self._added % 2 == 0 else "x_attended"
        if norm is None:
            y = steps.linear(name, a, self._times(linear, factor), residual=x)
        else:
            projected = steps.linear("projected", a, linear)
            steps.join()
            y = steps.normalize(name, projected, norm, residual=x, factor=factor)
        steps.join()
        return y

    def _times(self, linear: Linear, factor: float) -> Linear:
        """The projection with its result multiplied by a number."""
        if factor == 1.0:
            return linear
        if linear not in self._scaled:
            bias = None if linear.bias is None else linear.bias * np.float32(factor)
            self._scaled[linear] = Linear(linear.weight, bias, linear.scale * factor)
        return self._scaled[linear]

    def _normalize_heads(self, x: Float32Array, norm: Norm | None, kind: QkNorm | None) -> Float32Array:
        normed = self._normalize_named("heads_normed", x, norm, kind)
        self.steps.join()
        return normed

    def _normalize_named(self, name: str, x: Float32Array, norm: Norm | None, kind: QkNorm | None) -> Float32Array:
        """x (T, heads, Hd) with its heads normalized; without a join."""
        if norm is None or kind is None:
            return x
        rows = x.reshape(len(x), -1) if kind is QkNorm.WIDTH else x
        return self.steps.normalize(name, rows, norm).reshape(x.shape)

    def _gate_up(self, weights: FfnWeights, config: FfnConfig, normed: Float32Array) -> Float32Array:
        if not plain_gate(config):
            return super()._gate_up(weights, config, normed)
        steps = self.steps
        up = steps.linear("up", normed, weights.up)
        gate = None if weights.gate is None else steps.linear("gate", normed, weights.gate)
        steps.join()
        h = steps.gate(up, None, config.activation) if gate is None else steps.gate(gate, up, config.activation)
        steps.join()
        return self._normalize(h, weights.sub_norm)

    def _normalize(self, x: Float32Array, norm: Norm | None) -> Float32Array:
        if norm is None:
            return x
        normed = self.steps.normalize("normed", np.ascontiguousarray(x), norm)
        self.steps.join()
        return normed

    def _linear(self, linear: Linear, x: Float32Array) -> Float32Array:
        y = self.steps.linear("y", x, linear)
        self.steps.join()
        return y

    def _multiply(self, x: Float32Array, weight: Weight) -> Float32Array:
        return self._linear(Linear(weight), x)

    def _rows_of(self, chunk: int | None) -> CacheRows:
        """Where this step's rows are in the cache, made once per step and kind of layer."""
        if chunk not in self._rows:
            self._rows[chunk] = self.steps.cache_rows(self._batch, self._cache.tables, chunk)
        return self._rows[chunk]

    def _angles_of(self, rope: RopeTable) -> Angles:
        """The angles of this step's positions, made once per step and kind of layer."""
        if rope not in self._turns:
            self._turns[rope] = self.steps.angles(rope, self._batch.positions)
        return self._turns[rope]
