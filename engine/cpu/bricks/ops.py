"""The bricks of a forward pass on the CPU: plain numpy, with every matrix product handed to one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from engine.cpu import reference
from engine.cpu.bricks.indexer import Choices, Indexer, attend_chosen
from engine.cpu.bricks.mixture import Bricks, mix_experts
from engine.cpu.bricks.skips import make_skips
from engine.cpu.bricks.streams import Streams
from engine.cpu.caches.model import KVCache
from engine.cpu.recurrent.mix import mix_recurrent
from engine.cpu.recurrent.ngrams import add_ngrams
from engine.cpu.recurrent.rwkv import mix_channels
from engine.cpu.recurrent.tools import RecurrentKernels, Tools, softplus
from engine.errors import InvalidRequestError
from engine.gguf.quants import dequantize
from engine.model.batch import Batch, Span
from engine.model.config import ChannelMixConfig, FfnConfig, GateFunction, ModelConfig, MoeConfig, OutputGate, QkNorm
from engine.model.ops import LayerBricks
from engine.model.rope import RopeTable
from engine.model.weights import (
    CombinedWeights,
    ExpertLinear,
    FfnWeights,
    LayerWeights,
    Linear,
    ModelWeights,
    Norm,
    Weight,
)

Float32Array = reference.Float32Array
Product = Callable[[Float32Array, Weight], Float32Array]
"""product(x (T, M), W (N, M)) -> x @ W.T (T, N) float32, straight from packed rows, in an array of the caller's own."""


class CpuOps(LayerBricks[LayerWeights]):
    """Implements `engine.model.ops.Ops` over numpy arrays; the state of the step at hand is kept between bricks."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, cache: KVCache, product: Product) -> None:
        self._config = config
        self._weights = weights
        self._cache = cache
        self._product = product
        self._skips = make_skips(config.skip, config.width, self._linear)
        self._batch: Batch
        self._embedded: Float32Array  # what the first layer reads, where later ones read it again
        self._gate: Float32Array  # of the attention at hand
        self._layer_inputs: Float32Array  # (T, L, P) of the step at hand
        self._predicted: Float32Array  # streams (T, A, D) of the layer at hand
        self._streams = Streams(self._linear, self._normalize, config, weights)
        self._query_latent: Float32Array  # of the attention at hand
        self._choices: list[Choices] = []  # of the attention at hand, per span; kept for layers that share them
        self._scores: Float32Array  # of the experts of the layer at hand, where they are routed early
        self._input: Float32Array  # what the experts of the layer at hand read, where that is the layer's input
        self._angles: dict[RopeTable, tuple[Float32Array, Float32Array]] = {}
        self._recurrence: RecurrentKernels | None = None
        self._shared: dict[str, Float32Array] = {}  # what recurrent layers leave for later ones in the step at hand

    def settle(self) -> None:
        """Forget what an exception or a fork may have left of an earlier batch."""

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
        self._shared = {}

    def embed(self, batch: Batch) -> Float32Array:
        """See Ops.embed."""
        weights, streams = self._weights, self._streams
        x = self._embed_tokens(batch)
        if self._weights.layers[0].config.embedding_skip:
            self._embedded = x.copy()
        if weights.per_layer is not None:
            self._layer_inputs = streams.layer_inputs(weights.per_layer, x, batch.token_ids)
        if weights.spread is not None and self._config.streams is not None:
            return streams.spread(weights.spread, self._config.streams, x)
        return x if self._skips is None else self._skips.begin(self._weights.head_skip, x)

    def _embed_tokens(self, batch: Batch) -> Float32Array:
        """Token vectors (T, D), scaled, with positions, normalized."""
        weights = self._weights
        x = dequantize(weights.token_embd.raw[batch.token_ids], weights.token_embd.type)
        self._finish_embedding(x, batch)
        return x if weights.embedding_norm is None else self._normalize(x, weights.embedding_norm)

    def _finish_embedding(self, x: Float32Array, batch: Batch) -> None:
        """Scale token vectors, add the first type's vector and positions, in place."""
        positions, types = self._weights.position_embd, self._weights.token_types
        if self._config.embedding_scale != 1.0:
            x *= np.float32(self._config.embedding_scale)
        if types is not None:
            x += types
        if positions is not None:
            x += dequantize(positions.raw[batch.positions], positions.type)

    def mix(self, layer: LayerWeights, x: Float32Array) -> Float32Array:
        """See Ops.mix."""
        if layer.streams is not None and layer.config.streams is not None:
            self._predicted = self._streams.predict(layer.streams, layer.config.streams, x)
            x = np.ascontiguousarray(self._predicted[:, layer.config.streams.active])
        y = self._mix(layer, x)
        if layer.laurel is None:
            return y
        return self._streams.laurel(layer.laurel, self._normalize(x, layer.attn_norm), y)

    def _mix(self, layer: LayerWeights, x: Float32Array) -> Float32Array:
        """mix() without what layers do beside their parts."""
        if layer.moe is not None and isinstance(layer.config.ffn, MoeConfig):
            if layer.config.ffn.routed_early:
                self._scores = self._linear(layer.moe.router, x)
            if layer.config.ffn.reads_input:
                self._input = self._normalize(x, layer.moe.norm)
        if layer.ngrams is not None and layer.config.ngrams is not None:
            # Its cache comes behind those of all layers.
            tools = self._tools(self._config.n_layers)
            x = add_ngrams(layer.config.ngrams, layer.ngrams, self._batch.token_ids, x, tools)
        if layer.mixer is None:
            return x
        if self._skips is None:
            return self._mix_onto(layer, x, x)
        assert layer.mixer_skip is not None
        reading = self._skips.read(layer.mixer_skip, x)
        return self._skips.write(layer.mixer_skip, x, reading, self._mix_onto(layer, reading.h, None))

    def _mix_onto(self, layer: LayerWeights, h: Float32Array, x: Float32Array | None) -> Float32Array:
        """x + residual_scale · attn_post_norm(mixer(attn_norm(h))); without x what is added alone."""
        if layer.recurrent is None:
            mixed = self.attn_output(layer, self.attention(layer, self.attn_qkv(layer, h)), x)
            return mixed if x is None else self._output_norms(layer, mixed, x)
        part = self.recurrent(layer, h)
        if isinstance(layer.mixer, CombinedWeights):
            x = self.attn_output(layer, self.attention(layer, self.attn_qkv(layer, h)), x)
        return self._add(layer, part, layer.attn_post_norm, x)

    def feed_forward(self, layer: LayerWeights, x: Float32Array, y: Float32Array) -> Float32Array:
        """See Ops.feed_forward."""
        z = self._feed_forward(layer, x, y)
        config = layer.config.streams
        if layer.streams is not None and config is not None:
            z = self._streams.correct(layer.streams, config, self._predicted, z)
        if layer.layer_input is not None:
            own = self._layer_inputs[:, layer.index]
            if layer.streams is None or config is None:
                z = z + self._streams.add_layer_input(layer.layer_input, z, own)
            else:
                read = z[:, config.active] * layer.streams.scale
                z[:, 1:] += self._streams.add_layer_input(layer.layer_input, read, own)[:, None]
        return z if layer.output_scale == 1.0 else z * np.float32(layer.output_scale)

    def _feed_forward(self, layer: LayerWeights, x: Float32Array, y: Float32Array) -> Float32Array:
        """feed_forward() without what layers do beside their parts."""
        if layer.channel_mix is not None:
            return self.channel_mix(layer, x, y)
        if self._skips is None or layer.ffn_skip is None:
            added: Float32Array = super().feed_forward(layer, x, y)
            if layer.embedding_scale:
                added += np.float32(layer.embedding_scale) * self._embedded
            return self._normalize(added, layer.layer_output_norm or layer.closing_norm)
        reading = self._skips.read(layer.ffn_skip, y)
        part: Float32Array = super().feed_forward(layer, reading.h, None)
        return self._skips.write(layer.ffn_skip, y, reading, part)

    def _output_norms(self, layer: LayerWeights, y: Float32Array, x: Float32Array) -> Float32Array:
        """The norms behind the residual that the layer has; x is the layer's input."""
        y = self._normalize(y, layer.attn_output_norm)
        return y if layer.attn_norm_2 is None else self._normalize(y + x, layer.attn_norm_2)

    def recurrent(self, layer: LayerWeights, x: Float32Array) -> Float32Array:
        """The recurrent mixer of a layer, from attn_norm to before the residual."""
        config, weights = layer.config.recurrent_part, layer.recurrent
        assert config is not None
        assert weights is not None
        return mix_recurrent(config, weights, self._normalize(x, layer.attn_norm), self._tools(layer.index))

    def channel_mix(self, layer: LayerWeights, x: Float32Array, y: Float32Array) -> Float32Array:
        """A feed-forward part that mixes tokens, with its residual: as Ops.feed_forward."""
        assert layer.channel_mix is not None
        assert isinstance(layer.config.ffn, ChannelMixConfig)
        normed = self._normalize(x, layer.ffn_norm)
        part = mix_channels(layer.config.ffn, layer.channel_mix, normed, self._tools(layer.index))
        return self._add(layer, part, layer.ffn_post_norm, y)

    def _tools(self, memory: int) -> Tools:
        """What a recurrent part needs whose states are in the cache of this number."""
        kernels = self._recurrence
        return Tools(self._linear, self._normalize, self._cache, memory, self._batch.spans, self._shared, kernels)

    def attn_qkv(self, layer: LayerWeights, x: Float32Array) -> Float32Array:
        """See LayerBricks.attn_qkv."""
        attention, weights = layer.config.attention, layer.attention
        normed = self._normalize(x, layer.attn_norm)
        if weights.gate is not None:
            self._gate = self._linear(weights.gate, normed)
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

    def _normalize_heads(self, x: Float32Array, norm: Norm | None, kind: QkNorm | None) -> Float32Array:
        return x if norm is None or kind is None else reference.normalize_heads(x, norm, kind)

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

    def _each_head(self, weights: ExpertLinear, x: Float32Array) -> Float32Array:
        """Every head's own matrix: x (T, H, M) to (T, H, N)."""
        heads = (self._linear(weights.expert(h), np.ascontiguousarray(x[:, h])) for h in range(x.shape[1]))
        return np.stack(list(heads), axis=1)

    def attention(self, layer: LayerWeights, q: Float32Array) -> Float32Array:
        """See LayerBricks.attention."""
        attention = layer.config.attention
        out = np.empty((len(q), attention.n_heads * attention.value_width), dtype=np.float32)
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

    def attn_output(self, layer: LayerWeights, a: Float32Array, x: Float32Array | None) -> Float32Array:
        """See LayerBricks.attn_output."""
        part = self._linear(layer.attention.output, self._values(layer, a))
        return self._add(layer, part, layer.attn_post_norm, x)

    def _values(self, layer: LayerWeights, a: Float32Array) -> Float32Array:
        """The heads' values (T, H · Hv): what attention gives, or what is made of its latent vectors, then sub_norm."""
        return self._normalize(self._gated_values(layer, a), layer.attention.sub_norm)

    def _gated_values(self, layer: LayerWeights, a: Float32Array) -> Float32Array:
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

    def ffn_gate_up(self, layer: LayerWeights, x: Float32Array) -> Float32Array:
        """See LayerBricks.ffn_gate_up."""
        assert layer.ffn is not None
        assert isinstance(layer.config.ffn, FfnConfig)
        return self._gate_up(layer.ffn, layer.config.ffn, self._normalize(x, layer.ffn_norm))

    def ffn_down(self, layer: LayerWeights, h: Float32Array, y: Float32Array | None) -> Float32Array:
        """See LayerBricks.ffn_down."""
        assert layer.ffn is not None
        return self._add(layer, self._linear(layer.ffn.down, h), layer.ffn_post_norm, y)

    def ffn_moe(self, layer: LayerWeights, x: Float32Array, y: Float32Array | None) -> Float32Array:
        """See LayerBricks.ffn_moe."""
        moe, config = layer.moe, layer.config.ffn
        assert moe is not None
        assert isinstance(config, MoeConfig)
        normed = self._normalize(x, layer.ffn_norm)
        read = self._input if config.reads_input else normed
        scored = read
        if config.separate_norms:
            scored, read = self._normalize(x, moe.router_norm), self._normalize(x, moe.norm)
        scores = self._scores if config.routed_early else self._linear(moe.router, scored)
        bricks = Bricks(self._linear, self._normalize, self._gate_up)
        out = mix_experts(moe, config, bricks, normed, read, scores)
        return self._add(layer, out, layer.ffn_post_norm, y)

    def _add(self, layer: LayerWeights, part: Float32Array, norm: Norm | None, x: Float32Array | None) -> Float32Array:
        """x + residual_scale · norm(part), in an array of its own; `part` may be overwritten. None adds nothing."""
        y = self._normalize(part, norm)
        if layer.config.residual_scale != 1.0:
            y *= np.float32(layer.config.residual_scale)
        if x is not None:
            y += x
        return y

    def head(self, x: Float32Array, batch: Batch) -> Float32Array:
        """See Ops.head."""
        return self.head_rows(x[batch.output_rows])

    def head_rows(self, x: Float32Array) -> Float32Array:
        """Final norm and output projection of the given rows: (R, D) to logits (R, V)."""
        return self.finish_logits(self._linear(self._weights.head, self.normed(x)))

    def normed(self, x: Float32Array) -> Float32Array:
        """What the head reads (R, D) of the streams behind the last layer, normalized: embeddings are made of it."""
        return self._normalize(self._last(x), self._weights.output_norm)

    def _last(self, x: Float32Array) -> Float32Array:
        """What the head reads (R, D) of the streams behind the last layer."""
        if self._weights.spread is not None and self._config.streams is not None:
            return self._streams.merge(self._weights.spread, self._config.streams, x)
        if self._skips is None or self._weights.head_skip is None:
            return x
        return self._skips.read(self._weights.head_skip, x).h

    def _merge(self, x: Float32Array) -> Float32Array:
        """The rows as one vector per token."""
        spread, streams = self._weights.spread, self._config.streams
        return x if spread is None or streams is None else self._streams.merge(spread, streams, x)

    def finish_logits(self, logits: Float32Array) -> Float32Array:
        """Scale and cap, in place."""
        config = self._config
        if config.logit_scale != 1.0:
            logits *= np.float32(config.logit_scale)
        if config.logit_softcap is not None:
            reference.softcap(logits, config.logit_softcap)
        if config.silent is not None:
            logits[..., slice(*config.silent)] = np.finfo(np.float32).min
        return logits

    def _gate_up(self, weights: FfnWeights, config: FfnConfig, normed: Float32Array) -> Float32Array:
        up = self._linear(weights.up, normed)
        if weights.gate is None:
            h = reference.activate(up, config.activation, config.xielu)
        else:
            h = reference.gated(self._linear(weights.gate, normed), up, config)
        if weights.act_scales is not None:
            h /= weights.act_scales
        return self._normalize(h, weights.sub_norm)

    def _normalize(self, x: Float32Array, norm: Norm | None) -> Float32Array:
        return x if norm is None else reference.normalize(x, norm)

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
