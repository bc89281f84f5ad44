"""The bricks of a forward pass on the CPU: plain numpy, with every matrix product handed to one function.

Embedding, the order of a layer, recurrent and feed-forward parts, and the head; attention is in attention.py.
"""

from __future__ import annotations

import numpy as np

from engine.cpu import reference
from engine.cpu.bricks.attention import AttentionBricks
from engine.cpu.bricks.base import Float32Array, Product
from engine.cpu.bricks.mixture import Bricks, mix_experts
from engine.cpu.bricks.skips import make_skips
from engine.cpu.bricks.streams import Streams
from engine.cpu.caches.model import KVCache
from engine.cpu.recurrent.mix import mix_recurrent
from engine.cpu.recurrent.ngrams import add_ngrams
from engine.cpu.recurrent.rwkv import mix_channels
from engine.cpu.recurrent.tools import RecurrentKernels, Tools
from engine.gguf.quants import dequantize
from engine.model.batch import Batch
from engine.model.config import ChannelMixConfig, FfnConfig, ModelConfig, MoeConfig
from engine.model.weights import CombinedWeights, FfnWeights, LayerWeights, ModelWeights


class CpuOps(AttentionBricks):
    """Implements `engine.model.ops.Ops` over numpy arrays; the state of the step at hand is kept between bricks."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, cache: KVCache, product: Product) -> None:
        super().__init__(config, weights, cache, product)
        self._skips = make_skips(config.skip, config.width, self._linear)
        self._streams = Streams(self._linear, self._normalize, config, weights)
        self._embedded: Float32Array  # what the first layer reads, where later ones read it again
        self._layer_inputs: Float32Array  # (T, L, P) of the step at hand
        self._predicted: Float32Array  # streams (T, A, D) of the layer at hand
        self._scores: Float32Array  # of the experts of the layer at hand, where they are routed early
        self._input: Float32Array  # what the experts of the layer at hand read, where that is the layer's input
        self._recurrence: RecurrentKernels | None = None
        self._shared: dict[str, Float32Array] = {}  # what recurrent layers leave for later ones in the step at hand

    def settle(self) -> None:
        """Forget what an exception or a fork may have left of an earlier batch."""

    def begin(self, batch: Batch) -> None:
        """See Ops.begin."""
        super().begin(batch)
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
        out = mix_experts(moe, config, bricks, normed, read, scores, self._batch.token_ids)
        return self._add(layer, out, layer.ffn_post_norm, y)

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
