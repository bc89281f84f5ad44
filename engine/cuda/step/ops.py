"""The bricks of a forward pass on the GPU that decode steps and prompts share.

Every brick is a fixed sequence of launches into preallocated buffers, the one that the launch plan lists; lengths and
positions are read from device memory, so a decode step can be captured once and replayed for every length. Must not
know of requests or sampling.
"""

from __future__ import annotations

from engine.cuda.attention.cache import BlockCache
from engine.cuda.attention.heads import prepare_heads
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.formats.dequant import embed
from engine.cuda.indexer.indexer import Rows
from engine.cuda.load.device_compressed import DeviceCompressed
from engine.cuda.load.device_products import DeviceProjection
from engine.cuda.load.device_weights import DeviceAttention, DeviceLayer
from engine.cuda.rows import parts, streams
from engine.cuda.rows import rows as row_ops
from engine.cuda.rows.parts import NO_ROPE, DeviceNorm
from engine.cuda.step.bricks.mixture import MixtureBricks
from engine.cuda.step.bricks.streams import StreamBricks
from engine.cuda.step.compressed import attend_blocks, block_inputs, block_values
from engine.cuda.step.folding import Hidden, Read, columns_of, rows_of
from engine.cuda.step.indexer import Indexers, index_inputs
from engine.cuda.step.latent import latent_qkv, latent_values, low_rank_queries
from engine.cuda.step.moves import Moves
from engine.cuda.step.ngrams import add_ngrams
from engine.cuda.step.recurrent import move_states
from engine.cuda.step.rwkv import mix_channels


class CudaOps(MixtureBricks, StreamBricks):
    """What decode and prefill share: products with norm, activation and residual folded in. See RowBricks."""

    _moves: Moves | None  # None where no layer has a state
    _indexers: Indexers

    # ---- around the layers -----------------------------------------------------------------------------------

    def _embed(self, tokens: DeviceArray, positions: DeviceArray) -> DeviceArray:
        """See Ops.embed. Not launched early: the attention kernels read positions before their own wait."""
        weights, x = self.weights, self.buffers.x[: self.n_rows]
        embed(weights.token_embd, tokens, x, scale=weights.embedding_scale, pdl=False)
        if weights.token_types is not None:
            row_ops.add_bias(x, weights.token_types, 1.0)
        if weights.position_embd is not None:
            part = self.buffers.part[: self.n_rows]
            embed(weights.position_embd, positions, part)
            row_ops.add_scaled(x, part, None, 0)
        if weights.embedding_norm is not None:
            parts.normalize(x, x, weights.embedding_norm)
        if weights.plan.keeps_embeddings:
            row_ops.copy(x, self.buffers.embedded[: self.n_rows])
        if weights.per_layer is not None:
            self._layer_inputs(weights.per_layer, tokens, x)
        if weights.spread is not None:
            self._spread(weights.spread, x)
        if weights.head_skip is not None:
            self._fill_streams(weights.head_skip, x)
        return x

    def logits(self, x: DeviceArray, out: DeviceArray) -> None:
        """Final norm and output projection of rows x (R, D) into out (R, V), contiguous."""
        weights = self.weights
        assert weights.output is not None
        source, norm = self._normed(x, weights.output_norm)
        ready = weights.plan.output_takes_left and self.step.hands_over
        self._product(weights.output, source, out, norm=norm, ready=ready)
        if weights.logit_softcap is not None:
            parts.softcap(out, weights.logit_softcap)
        if weights.silent is not None:
            parts.silence(out, *weights.silent)

    # ---- mixers ----------------------------------------------------------------------------------------------

    def mix(self, layer: DeviceLayer, x: DeviceArray) -> DeviceArray:
        """See Ops.mix."""
        moe, n = layer.moe, self.n_rows
        if layer.streams is not None:
            streams.predict(layer.streams, self.buffers.streams[:n], self.buffers.predicted[:n], x)
        if layer.laurel is not None:
            assert layer.attn_norm is not None
            parts.normalize(x, self.buffers.normed[:n], layer.attn_norm)
        if moe is not None and moe.plan.routed_early:
            self._score(moe, Read(x, None), self._scores_of(moe))
        if moe is not None and moe.plan.reads_input:
            assert moe.norm is not None
            parts.normalize(x, self.buffers.beside[: self.n_rows], moe.norm)
        if layer.ngrams is not None:
            assert self._moves is not None
            target = x if self.weights.plan.skips is None else self._streams()
            add_ngrams(layer.ngrams, self._tokens, target, self._moves)
        if layer.mixer is None:
            return x
        if layer.attn_norm_2 is not None:
            row_ops.copy(x, self.buffers.beside[: self.n_rows])
        if layer.mixer_skip is not None:
            self._read_skip(layer.mixer_skip, x)
        attends = layer.attention_part is not None or layer.compressed is not None
        q = self.attn_qkv(layer, x) if attends else None
        mixed = None if layer.recurrent_part is None else self.ssm_in(layer, x)
        if layer.mixer_skip is not None:
            self._begin_skip(layer.mixer_skip, x)
        if q is not None:
            x = self.attn_output(layer, self.attention(layer, q), x)
        if mixed is not None:
            x = self.ssm_out(layer, self.ssm(layer, mixed), x)
        if layer.attn_output_norm is not None:
            parts.normalize(x, x, layer.attn_output_norm)
        if layer.attn_norm_2 is not None:
            row_ops.add_scaled(x, self.buffers.beside[: self.n_rows], None, 0)
            parts.normalize(x, x, layer.attn_norm_2)
        if layer.laurel is not None:
            self._add_laurel(layer.laurel, x)
        if layer.mixer_skip is not None:
            self._write_skip(layer.mixer_skip, x)
        return x

    def feed_forward(self, layer: DeviceLayer, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        """See Ops.feed_forward."""
        result: DeviceArray
        result = self.channel_mix(layer, x) if layer.channel_mix is not None else super().feed_forward(layer, x, y)
        if layer.ffn_skip is not None:
            self._write_skip(layer.ffn_skip, result)
        if layer.embedding_scale:
            parts.add_times(result, self.buffers.embedded[: self.n_rows], layer.embedding_scale)
        if layer.last_norm is not None:
            parts.normalize(result, result, layer.last_norm)
        if layer.streams is not None:
            n = self.n_rows
            streams.correct(layer.streams, self.buffers.predicted[:n], result, self.buffers.streams[:n])
        if layer.layer_input is not None:
            self._add_layer_input(layer, layer.layer_input, result)
        if layer.output_scale != 1.0:
            parts.scale(result, layer.output_scale)
        if layer.index == len(self.weights.layers) - 1:
            self._finish(result)
        return result

    def _finish(self, x: DeviceArray) -> None:
        """What the head reads of several streams, behind the last layer."""
        if self.weights.head_skip is not None:
            self._read_skip(self.weights.head_skip, x)
        if self.weights.spread is not None:
            self._merge(self.weights.spread, x)

    def ssm_in(self, layer: DeviceLayer, x: DeviceArray) -> DeviceArray:
        """attn_norm and the first products of a recurrent layer, side by side; without any what attn_norm gives."""
        inputs = layer.recurrent.inputs
        mixed = columns_of(self.buffers.mixed, self.n_rows, layer.recurrent.plan.mixed_width)
        if inputs is None:
            assert layer.attn_norm is not None
            parts.normalize(x, mixed, layer.attn_norm)
            return mixed
        source, norm = self._normed(x, layer.attn_norm)
        self._product(inputs, source, mixed, norm=norm, ready=layer.plan.takes_left and self.step.hands_over)
        return mixed

    def ssm(self, layer: DeviceLayer, mixed: DeviceArray) -> DeviceArray:
        """Everything of a recurrent layer between the first and the last product, which moves its states on."""
        assert self._moves is not None
        return move_states(layer.index, layer.recurrent, mixed, self._moves)

    def ssm_out(self, layer: DeviceLayer, h: DeviceArray, x: DeviceArray) -> DeviceArray:
        """x + the last product of a recurrent layer; see attn_output."""
        return self._mixed(layer, layer.recurrent.output, h, x)

    def _qkv(self, layer: DeviceLayer, x: DeviceArray, positions: DeviceArray) -> DeviceArray:
        """Queries, keys and values of every row as the attention kernels read them."""
        if layer.compressed is not None:
            blocks = layer.compressed
            qkv = columns_of(self.buffers.qkv, self.n_rows, blocks.plan.shape.attention.row_width)
            source, norm = self._normed(x, layer.attn_norm)
            block_inputs(blocks, self._product, source, norm, self.buffers, positions, qkv)
            return qkv
        mixer = layer.attention
        source, norm = self._normed(x, layer.attn_norm)
        qkv = columns_of(self.buffers.qkv, self.n_rows, mixer.shape.row_width)
        if mixer.latent is not None:
            latent_qkv(mixer.latent, self._product, source, norm, self.buffers, positions, qkv, self.step)
        else:
            assert mixer.qkv is not None
            ready = layer.plan.takes_left and self.step.hands_over
            self._product(mixer.qkv, source, qkv, norm=norm, ready=ready)
        if mixer.heads is not None:
            prepare_heads(mixer.heads, mixer.shape, qkv, positions)
        if mixer.plan.kept_at is not None:
            self._share_cache(mixer, qkv, positions)
        if mixer.indexer is not None:
            latent = None if mixer.latent is None else low_rank_queries(mixer.latent, self.buffers, self.n_rows)
            index_inputs(mixer.indexer, self._product, source, norm, latent, self.buffers, positions)
        return qkv

    def _attend_blocks(self, mixer: DeviceCompressed, qkv: DeviceArray, cache: BlockCache, rows: Rows) -> DeviceArray:
        """Attention over a window and compressed blocks, what it reads is cached first."""
        shape = mixer.plan.shape
        out = columns_of(self.buffers.attention, self.n_rows, shape.heads * shape.head)
        attend_blocks(mixer, self._indexers.blocks(mixer.plan), self.buffers, qkv, cache, rows, out)
        return out

    def _share_cache(self, mixer: DeviceAttention, qkv: DeviceArray, positions: DeviceArray) -> None:
        """Keys and values of a layer are kept for later ones, or are those that an earlier one has kept.

        The kernels then cache them once more, where they are already: the same bits.
        """
        plan, shape = mixer.plan, mixer.shape
        assert plan.kept_at is not None
        first = shape.heads * shape.key_dim
        own = qkv[:, None, first : first + plan.kept_width]
        kept = self.buffers.kept[: self.n_rows, None, plan.kept_at : plan.kept_at + plan.kept_width]
        source, target = (own, kept) if plan.cache_layer is None else (kept, own)
        parts.rotate(source, target, NO_ROPE, positions)

    def _gates(self, mixer: DeviceAttention) -> DeviceArray:
        """The gates of a layer's values, (T, G)."""
        gates = mixer.plan.gates
        if mixer.latent is not None:
            return columns_of(self.buffers.inputs, self.n_rows, mixer.latent.inputs.width)[:, :gates]
        width, first = mixer.shape.row_width, mixer.shape.row_width - mixer.shape.gate
        return columns_of(self.buffers.qkv, self.n_rows, width)[:, first : first + gates]

    def attn_output(self, layer: DeviceLayer, a: Hidden, x: DeviceArray) -> DeviceArray:
        """See LayerBricks.attn_output; in a parallel layer only what attention adds to x, which ffn reads again.

        Gates are read where attn_qkv has left them.
        """
        if layer.compressed is not None:
            a = block_values(layer.compressed, self._product, rows_of(a), self.buffers, self._positions)
            return self._mixed(layer, layer.compressed.output, a, x)
        mixer = layer.attention
        if mixer.latent is not None:
            a = latent_values(mixer.latent, self._product, rows_of(a), self.buffers, self.step)
        if mixer.plan.gates:
            parts.multiply_gate(rows_of(a), self._gates(mixer), softplus=mixer.softplus)
        if mixer.sub_norm is not None:
            parts.normalize(rows_of(a), rows_of(a), mixer.sub_norm)
        last = layer.recurrent_part is None
        return self._mixed(layer, mixer.output, a, x, last=last)

    def _mixed(
        self, layer: DeviceLayer, output: DeviceProjection, a: Hidden, x: DeviceArray, *, last: bool = True
    ) -> DeviceArray:
        """The last product of a mixer, added to x, or beside it in a parallel layer. last: nothing more is mixed in."""
        if not layer.parallel:
            then = layer.ffn_norm if last and layer.plan.leaves_inside else None
            if last and layer.plan.ffn is None and layer.plan.leaves_behind:
                then = self._norm_behind(layer)
            self._add(layer, output, a, layer.attn_post_norm, x, then=then if self.step.hands_over else None)
            return x
        beside = self.buffers.beside[: self.n_rows]
        self._product(output, a, beside)
        if layer.attn_post_norm is not None:
            parts.normalize(beside, beside, layer.attn_post_norm, scale=layer.residual_scale)
        return beside

    # ---- feed-forward parts ----------------------------------------------------------------------------------

    def channel_mix(self, layer: DeviceLayer, x: DeviceArray) -> DeviceArray:
        """x + RWKV's feed-forward part of ffn_norm(x), which keeps an input of its own in the layer's states."""
        mixer, moves, norm = layer.channel_mix, self._moves, layer.ffn_norm
        assert mixer is not None and moves is not None and norm is not None
        assert layer.ffn_post_norm is None
        normed = columns_of(self.buffers.mixed, self.n_rows, self.weights.plan.width)
        parts.normalize(x, normed, norm)
        mix_channels(mixer, normed, moves.states.arrays(layer.index)[2], x, moves)
        return x

    def ffn_gate_up(self, layer: DeviceLayer, x: DeviceArray) -> Hidden:
        """See LayerBricks.ffn_gate_up."""
        assert layer.ffn is not None
        ready, leaves = (one and self.step.hands_over for one in (layer.plan.leaves_inside, layer.plan.leaves_hidden))
        if layer.ffn_skip is None:
            return self._gate_up(layer.ffn, *self._normed(x, layer.ffn_norm), ready=ready, leaves=leaves)
        self._read_skip(layer.ffn_skip, x)
        h = self._gate_up(layer.ffn, *self._normed(x, layer.ffn_norm), ready=ready)
        self._begin_skip(layer.ffn_skip, x)
        return h

    def ffn_down(self, layer: DeviceLayer, h: Hidden, y: DeviceArray) -> DeviceArray:
        """See LayerBricks.ffn_down; y is what attn_output gave."""
        assert layer.ffn is not None
        stream = self.buffers.x[: self.n_rows] if layer.parallel else y
        then = self._norm_behind(layer) if layer.plan.leaves_behind and self.step.hands_over else None
        self._add(layer, layer.ffn.down, h, layer.ffn_post_norm, stream, then=then)
        return self._joined(layer, stream, y)

    def _norm_behind(self, layer: DeviceLayer) -> DeviceNorm | None:
        """The norm of what reads the stream behind a layer."""
        layers = self.weights.layers
        return layers[layer.index + 1].attn_norm if layer.index + 1 < len(layers) else self.weights.output_norm
