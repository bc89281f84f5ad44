"""The bricks of attention on the CPU: from a layer's input to queries and a longer cache, to values, to the output."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from engine.cpu import reference
from engine.cpu.bricks.base import Float32Array, StepBricks
from engine.cpu.bricks.compressed import Compressed, Projected
from engine.cpu.bricks.indexer import Choices, Indexer, attend_chosen
from engine.cpu.recurrent.tools import softplus
from engine.model.batch import Span
from engine.model.config import GateFunction, OutputGate
from engine.model.weights import ExpertLinear, LayerWeights, Norm


class AttentionBricks(StepBricks):
    """attn_qkv, attention and attn_output of engine.model.ops.LayerBricks, in plain numpy."""

    _gate: Float32Array  # of the attention at hand
    _query_latent: Float32Array  # likewise
    _projected: Projected  # likewise, where it has compressed blocks
    _choices: list[Choices]  # likewise, per span; kept for layers that share them

    def attn_qkv(self, layer: LayerWeights, x: Float32Array) -> Float32Array:
        """See LayerBricks.attn_qkv."""
        attention, weights = layer.config.attention, layer.attention
        normed = self._normalize(x, layer.attn_norm)
        if weights.gate is not None:
            self._gate = self._linear(weights.gate, normed)
        if attention.compressed is not None:
            return self._compress(layer, normed)
        if weights.latent is None:
            q, k, v = self._qkv(layer, normed)
        else:
            q, k, v = self._latent_qkv(layer, normed)
        if attention.temperature is not None:
            q *= reference.temperature_factors(self._batch.positions, attention.temperature)[:, None, None]
        if k is not None and v is not None:
            for span in self._batch.spans:
                rows = slice(span.row, span.row + span.n_rows)
                self._cache.append(layer.index, span, k[rows], v[rows])
        if attention.indexer is not None and weights.indexer is not None:
            self._choices = self._choose(layer, Indexer(attention.indexer, weights.indexer, self._linear), normed)
        return q

    def _choose(self, layer: LayerWeights, indexer: Indexer, normed: Float32Array) -> list[Choices]:
        """The positions that a layer's indexer chooses for every query of the step; extends its cache."""
        latent = None if layer.attention.latent is None else self._query_latent
        queries, keys = indexer.inputs(normed, latent, self._batch.positions)
        choices = []
        for span in self._batch.spans:
            self._cache.append_index(layer.index, span, keys[span.row : span.row + span.n_rows])
            choices.append(indexer.choose(queries, span, partial(self._cache.view_index, layer.index, span)))
        return choices

    def _compress(self, layer: LayerWeights, normed: Float32Array) -> Float32Array:
        """Queries of attention over a window and blocks; caches keys, and those of blocks that become full."""
        attention, index = layer.config.attention, layer.index
        compressed = Compressed(attention, layer.attention, self._linear)
        self._projected = projected = compressed.project(normed, self._batch.positions)
        for span in self._batch.spans:
            rows = slice(span.row, span.row + span.n_rows)
            self._cache.append(index, span, projected.key[rows], projected.key[rows])
            if projected.left is None:
                continue
            self._cache.append_index(index, span, projected.left[rows])
            assert attention.compressed is not None
            blocks = attention.compressed.blocks
            assert blocks is not None
            first = span.n_past // blocks.length
            if span.n_total // blocks.length > first:
                begin = max(0, first - blocks.overlap) * blocks.length
                left = self._cache.view_index(index, span, begin)
                self._cache.store_blocks(index, span, first, compressed.block_keys(left, first))
        return projected.q

    def _qkv(
        self, layer: LayerWeights, normed: Float32Array
    ) -> tuple[Float32Array, Float32Array | None, Float32Array | None]:
        """Queries (T, H, Hd), keys (T, K, Hd), values (T, K, Hv), the last two where the layer has its own."""
        attention, weights = layer.config.attention, layer.attention
        assert weights.q is not None
        q = self._linear(weights.q, normed)
        if attention.output_gate is OutputGate.IN_QUERY:
            both = q.reshape(len(q), attention.n_heads, 2, attention.key_width)
            q, self._gate = np.ascontiguousarray(both[:, :, 0]), both[:, :, 1].reshape(len(q), -1)
        q = self._turn(layer, q.reshape(-1, attention.n_heads, attention.key_width), weights.q_norm)
        if weights.k is None or weights.v is None:
            return q, None, None
        k = self._linear(weights.k, normed).reshape(-1, attention.n_kv_heads, attention.key_width)
        v = self._linear(weights.v, normed).reshape(-1, attention.n_kv_heads, attention.value_width)
        if attention.clamp is not None:
            np.clip(v, -attention.clamp, attention.clamp, out=v)
        return q, self._turn(layer, k, weights.k_norm), self._normalize(v, weights.v_norm)

    def _turn(self, layer: LayerWeights, x: Float32Array, norm: Norm | None) -> Float32Array:
        """Queries or keys (T, heads, Hd) as projected: clamped, normalized and rotated, perhaps in place."""
        attention, rope = layer.config.attention, layer.attention.rope
        if attention.clamp is not None:
            np.clip(x, -attention.clamp, attention.clamp, out=x)
        if not attention.qk_norm_after_rope:
            x = self._normalize_heads(x, norm, attention.qk_norm)
        if rope is not None:
            reference.rotate(x, *self._cos_sin(rope), rope.style)
        return self._normalize_heads(x, norm, attention.qk_norm) if attention.qk_norm_after_rope else x

    def _latent_qkv(self, layer: LayerWeights, normed: Float32Array) -> tuple[Float32Array, Float32Array, Float32Array]:
        """The same of latent attention: what LatentConfig says goes through the cache."""
        attention, weights = layer.config.attention, layer.attention.latent
        config = attention.latent
        assert weights is not None
        assert config is not None
        heads, nope, rows = attention.n_heads, config.nope_width, len(normed)
        if weights.q is not None:
            queries = self._linear(weights.q, normed)
        else:
            assert weights.q_a is not None
            assert weights.q_b is not None
            self._query_latent = self._normalize(self._linear(weights.q_a, normed), weights.q_a_norm)
            queries = self._linear(weights.q_b, self._query_latent)
        queries = queries.reshape(rows, heads, nope + config.rope_width)
        compressed = self._linear(weights.kv_a, normed)
        latent = self._normalize(np.ascontiguousarray(compressed[:, : config.rank]), weights.kv_a_norm)
        turned_q, turned_k = queries[..., nope:], compressed[:, None, config.rank :]
        if weights.k_norm is not None:
            turned_k = self._normalize(np.ascontiguousarray(turned_k), weights.k_norm)
        if layer.attention.rope is not None:
            cos, sin = self._cos_sin(layer.attention.rope)
            reference.rotate(turned_q, cos, sin, layer.attention.rope.style)
            reference.rotate(turned_k, cos, sin, layer.attention.rope.style)
        if weights.k_b is not None:
            absorbed = self._each_head(weights.k_b, queries[..., :nope])
            key = np.concatenate((latent[:, None, :], turned_k), axis=-1)
            return np.concatenate((absorbed, turned_q), axis=-1), key, latent[:, None, :]
        assert weights.kv_b is not None
        expanded = self._linear(weights.kv_b, latent).reshape(rows, heads, nope + config.value_width)
        shared = np.broadcast_to(turned_k, (rows, heads, config.rope_width))
        return queries, np.concatenate((expanded[..., :nope], shared), axis=-1), expanded[..., nope:]

    def attention(self, layer: LayerWeights, q: Float32Array) -> Float32Array:
        """See LayerBricks.attention."""
        attention = layer.config.attention
        out = np.empty((len(q), attention.n_heads * attention.value_width), dtype=np.float32)
        if attention.compressed is not None:
            for span in self._batch.spans:
                self._attend_blocks(out, layer, q, span)
            return out
        if attention.indexer is None:
            for span in self._batch.spans:
                self._attend(out, layer, q, span)
            return out
        for span, choices in zip(self._batch.spans, self._choices, strict=True):
            if choices.n_all:
                self._attend(out, layer, q, replace(span, n_rows=choices.n_all))
            if choices.chosen:
                self._attend_chosen(out, layer, q, span, choices)
        return out

    def _attend(self, out: Float32Array, layer: LayerWeights, q: Float32Array, span: Span) -> None:
        """Attention of a span's queries over all they see, into its rows of out (T, H · Hv)."""
        weights, rows = layer.attention, slice(span.row, span.row + span.n_rows)
        keys, values = self._cache.view(layer.index, span)
        extra = {
            "sinks": weights.sinks,
            "alibi_slopes": weights.alibi_slopes,
            "relative_bias": weights.relative_bias,
        }
        out[rows] = reference.attend(q[rows], keys, values, layer.config.attention, span.n_past, **extra)

    def _attend_chosen(
        self, out: Float32Array, layer: LayerWeights, q: Float32Array, span: Span, choices: Choices
    ) -> None:
        """The same of the rows for which an indexer has chosen positions."""
        keys, values = self._cache.view(layer.index, span)
        sinks = layer.attention.sinks
        for row, chosen in enumerate(choices.chosen, span.row + choices.n_all):
            out[row] = attend_chosen(q[row], keys, values, layer.config.attention, chosen, sinks)

    def _attend_blocks(self, out: Float32Array, layer: LayerWeights, q: Float32Array, span: Span) -> None:
        """The same of a span in a layer with compressed blocks; queries before the first full block see none."""
        attention = layer.config.attention
        assert attention.compressed is not None
        blocks = attention.compressed.blocks
        n_alone = span.n_rows if blocks is None else min(max(blocks.length - 1 - span.n_past, 0), span.n_rows)
        if n_alone:
            self._attend(out, layer, q, replace(span, n_rows=n_alone))
        if blocks is None or n_alone == span.n_rows:
            return
        compressed = Compressed(attention, layer.attention, self._linear)
        keys, _ = self._cache.view(layer.index, span)
        block_keys = self._cache.view_blocks(layer.index, span, span.n_total // blocks.length)
        for row in range(n_alone, span.n_rows):
            at = span.row + row
            out[at] = compressed.attend(self._projected, at, span.n_past + row, keys, block_keys)

    def attn_output(self, layer: LayerWeights, a: Float32Array, x: Float32Array | None) -> Float32Array:
        """See LayerBricks.attn_output."""
        part = self._linear(layer.attention.output, self._values(layer, a))
        return self._add(layer, part, layer.attn_post_norm, x)

    def _values(self, layer: LayerWeights, a: Float32Array) -> Float32Array:
        """The heads' values (T, H · Hv): what attention gives, or what is made of its latent vectors, then sub_norm."""
        return self._normalize(self._gated_values(layer, a), layer.attention.sub_norm)

    def _gated_values(self, layer: LayerWeights, a: Float32Array) -> Float32Array:
        if layer.config.attention.compressed is not None:
            compressed = Compressed(layer.config.attention, layer.attention, self._linear)
            return compressed.output(a, self._batch.positions)
        config, latent = layer.config.attention, layer.attention.latent
        if latent is not None and latent.v_b is not None:
            heads = a.reshape(len(a), config.n_heads, -1)
            a = self._each_head(latent.v_b, heads).reshape(len(a), -1)
        if config.output_gate is None:
            return a
        gate = (softplus if config.gate_function is GateFunction.SOFTPLUS else reference.sigmoid)(self._gate)
        if config.output_gate is OutputGate.PER_HEAD:
            gate = np.repeat(gate, a.shape[1] // config.n_heads, axis=1)
        return a * gate

    def _each_head(self, weights: ExpertLinear, x: Float32Array) -> Float32Array:
        """Every head's own matrix: x (T, H, M) to (T, H, N)."""
        heads = (self._linear(weights.expert(h), np.ascontiguousarray(x[:, h])) for h in range(x.shape[1]))
        return np.stack(list(heads), axis=1)
