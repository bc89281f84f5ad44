"""The bricks of a forward pass on the GPU, for decode steps and for prompts.

Every brick is a fixed sequence of launches into preallocated buffers; lengths and positions are read from device
memory, so a decode step can be captured once and replayed for every length. Must not know of requests or sampling.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.cuda.attention.attention import Attention, AttentionShape, prefill_tiles
from engine.cuda.attention.cache import PagedCache
from engine.cuda.attention.heads import prepare_heads
from engine.cuda.attention.latent import latent_qkv, latent_values
from engine.cuda.driver.staging import Staging
from engine.cuda.experts import router
from engine.cuda.experts.moe_rows import SHARING_ROWS
from engine.cuda.experts.prefill import GROUPED_ROWS
from engine.cuda.formats.dequant import embed
from engine.cuda.load.buffers import Activations
from engine.cuda.load.weights import DeviceFfn, DeviceLayer, DeviceMoe, DeviceWeights
from engine.cuda.matrix.decode_gemm import FEW_ROWS, MAX_ROWS
from engine.cuda.matrix.linear import Projection
from engine.cuda.matrix.matvec import BATCH_ROWS
from engine.cuda.rows import parts
from engine.cuda.rows import rows as row_ops
from engine.cuda.rows.parts import DeviceNorm
from engine.cuda.step.handover import norm_behind, norm_behind_attention
from engine.cuda.step.products import Products
from engine.model.batch import Batch
from engine.model.ops import LayerBricks


def _folded(norm: DeviceNorm | None) -> tuple[Any, float]:
    """Weight and epsilon of what a product applies itself."""
    assert norm is None or norm.folds
    return (None, 0.0) if norm is None else (norm.weight, norm.epsilon)


class CudaOps(LayerBricks[DeviceLayer]):
    """What decode and prefill share: products with norm, activation and residual folded in.

    Args:
        weights: the model.
        buffers: activations with room for every row of a batch.
        products: products of prompt rows; None for decode steps, whose kernels are those of matvec.py. Which it is goes
            by what a row is, never by how many there are: its bits must not depend on that.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        buffers: Activations,
        products: Products | None,
    ) -> None:
        self.weights = weights
        self.buffers = buffers
        self._products = products
        self._batch_rows: int | None = None
        self._n = 0

    def attn_output(self, layer: DeviceLayer, a: Any, x: Any) -> Any:
        """See LayerBricks.attn_output; in a parallel layer only what attention adds to x, which ffn reads again."""
        if layer.latent is not None:
            a = latent_values(layer.latent, self._product, a, self.buffers, at_once=self._products is None)
        if not layer.parallel:
            self._add(layer, layer.output, a, layer.attn_post_norm, x, then=self._left_inside(layer))
            return x
        beside = self.buffers.beside[: self._n]
        self._product(layer.output, a, beside)
        if layer.attn_post_norm is not None:
            parts.normalize(beside, beside, layer.attn_post_norm, scale=layer.residual_scale)
        return beside

    def ffn_gate_up(self, layer: DeviceLayer, x: Any) -> Any:
        """See LayerBricks.ffn_gate_up."""
        assert layer.ffn is not None
        return self._gate_up(layer.ffn, *self._normed(x, layer.ffn_norm), ready=self._left_inside(layer) is not None)

    def ffn_down(self, layer: DeviceLayer, h: Any, y: Any) -> Any:
        """See LayerBricks.ffn_down; y is what attn_output gave."""
        assert layer.ffn is not None
        stream = self.buffers.x[: self._n] if layer.parallel else y
        self._add(layer, layer.ffn.down, h, layer.ffn_post_norm, stream, then=self._left_behind(layer.index))
        return self._joined(layer, stream, y)

    def ffn_moe(self, layer: DeviceLayer, x: Any, y: Any) -> Any:
        """See LayerBricks.ffn_moe; y is what attn_output gave.

        Rows go to the experts they chose; where the card or the types forbid it, every expert multiplies all rows.
        """
        moe, post, n = layer.moe, layer.ffn_post_norm, self._n
        assert moe is not None
        source, norm = self._normed(x, layer.ffn_norm)
        scores = self._columns(self.buffers.router, n, moe.routing.n_experts)
        self._score(moe, source, scores, norm)
        gathers = self._gathers(moe)
        target = x if gathers and post is None else self.buffers.total[:n]
        if post is not None:
            parts.clear(target)
        elif not gathers:  # the sum goes beside x, which every expert still reads
            row_ops.copy(x, target)
        self._mixture(moe, source, norm, scores, target)
        if post is not None:
            parts.normalize(target, x, post, scale=layer.residual_scale, add=True)
        elif not gathers:
            row_ops.copy(target, x)
        return self._joined(layer, x, y)

    def _score(self, moe: DeviceMoe, x: Any, scores: Any, norm: DeviceNorm | None) -> None:
        """The router's product."""
        self._product(moe.router, x, scores, norm=norm)

    def _gathers(self, moe: DeviceMoe) -> bool:
        """Whether rows go to the experts they chose only."""
        return self._products is not None and self._products.serves_experts(moe)

    def _mixture(self, moe: DeviceMoe, x: Any, norm: DeviceNorm | None, scores: Any, out: Any) -> None:
        """Adds chosen experts of norm(x) and the shared one to out, which may be x if rows go to their own experts."""
        n, buffers = self._n, self.buffers
        if self._gathers(moe):
            assert self._products is not None
            shared = self._shared_hidden(moe, x, norm)  # reads x, which the experts may change
            weight, eps = _folded(norm)
            self._products.experts(moe, x, scores, buffers.expert_room, out, norm=weight, eps=eps)
        else:
            ids = self._columns(buffers.chosen, n, moe.routing.n_used)
            weights = self._columns(buffers.chosen_weights, n, moe.routing.n_used)
            router.route(moe.routing, scores, ids, weights, bias=moe.selection_bias)
            part = buffers.y[:n]
            for index, expert in enumerate(moe.experts):
                h = self._gate_up(expert, x, norm)
                self._product(expert.down, h, part)
                parts.add_chosen(out, part, ids, weights, index)
            shared = self._shared_hidden(moe, x, norm)  # uses the memory that the experts have used
        if shared is not None:
            self._add_shared(moe, *shared, out)

    def _shared_hidden(self, moe: DeviceMoe, x: Any, norm: DeviceNorm | None) -> tuple[Any, Any] | None:
        """Hidden values of the expert that every row passes through, and its factor (T, 1); None without one."""
        if moe.shared is None:
            return None
        mix = None
        if moe.shared_gate is not None:
            mix = self.buffers.mix[: self._n]
            self._product(moe.shared_gate, x, mix, norm=norm)
            row_ops.sigmoid(mix)
        return self._gate_up(moe.shared, x, norm), mix

    def _add_shared(self, moe: DeviceMoe, h: Any, mix: Any, out: Any) -> None:
        assert moe.shared is not None
        if mix is None:
            self._product(moe.shared.down, h, out, add=True)
            return
        y = self.buffers.y[: self._n]
        self._product(moe.shared.down, h, y)
        row_ops.add_scaled(out, y, mix, 0)

    def logits(self, x: Any, out: Any) -> None:
        """Final norm and output projection of rows x (R, D) into out (R, V), contiguous."""
        source, norm = self._normed(x, self.weights.output_norm)
        last = len(self.weights.layers) - 1
        self._product(self.weights.output, source, out, norm=norm, ready=self._left_behind(last) is not None)
        if self.weights.logit_softcap is not None:
            parts.softcap(out, self.weights.logit_softcap)

    def _finish_embedding(self, x: Any, positions: Any) -> Any:
        """Learned positions and the norm behind the embedding, in place."""
        weights = self.weights
        if weights.position_embd is not None:
            part = self.buffers.part[: self._n]
            embed(weights.position_embd, positions, part)
            row_ops.add_scaled(x, part, None, 0)
        if weights.embedding_norm is not None:
            parts.normalize(x, x, weights.embedding_norm)
        return x

    def _qkv(self, layer: DeviceLayer, x: Any, positions: Any) -> Any:
        """Queries, keys and values of every row as the attention kernels read them."""
        source, norm = self._normed(x, layer.attn_norm)
        qkv = self._columns(self.buffers.qkv, self._n, layer.shape.row_width)
        if layer.latent is not None:
            at_once = self._products is None
            latent_qkv(layer.latent, self._product, source, norm, self.buffers, positions, qkv, at_once=at_once)
        else:
            assert layer.qkv is not None
            ready = self._left_behind(layer.index - 1) is not None
            self._product(layer.qkv, source, qkv, norm=norm, ready=ready)
        if layer.heads is not None:
            prepare_heads(layer.heads, layer.shape, qkv, positions)
        return qkv

    def _add(
        self, layer: DeviceLayer, projection: Projection, x: Any, post: DeviceNorm | None, out: Any,
        then: DeviceNorm | None = None,
    ) -> None:  # fmt: skip
        """out += residual_scale * post(projection of x). then: see _product."""
        if post is None:
            self._product(projection, x, out, add=True, then=then)
            return
        part = self.buffers.part[: self._n]
        self._product(projection, x, part)
        parts.normalize(part, out, post, scale=layer.residual_scale, add=True)

    @staticmethod
    def _joined(layer: DeviceLayer, x: Any, y: Any) -> Any:
        """x, in parallel layers with what attention adds."""
        if layer.parallel:
            row_ops.add_scaled(x, y, None, 0)
        return x

    def _normed(self, x: Any, norm: DeviceNorm | None) -> tuple[Any, DeviceNorm | None]:
        """What a product of norm(x) reads, and what it applies itself."""
        if norm is None or norm.folds:
            return x, norm
        out = self.buffers.normed[: x.shape[0]]
        parts.normalize(x, out, norm)
        return out, None

    def _gate_up(self, ffn: DeviceFfn, x: Any, norm: DeviceNorm | None, *, ready: bool = False) -> Any:
        n, (weight, eps) = int(x.shape[0]), _folded(norm)
        h, up = self._columns(self.buffers.gate, n, ffn.width), self._columns(self.buffers.up, n, ffn.width)
        if ffn.paired is not None:
            if self._products is not None:
                return self._products.gated(ffn, x, self.buffers.gate, self.buffers.up, norm=weight, eps=eps)
            many = self.buffers.stream_operand if ready else self._batch_operand(n)
            ffn.paired(x, h, norm=weight, eps=eps, activation=ffn.activation, operand=many, ready=ready)
            return h
        assert ffn.up is not None
        if ffn.gate is None:
            self._product(ffn.up, x, h, norm=norm)
            row_ops.gate(h, None, ffn.activation)
        else:
            self._product(ffn.gate, x, h, norm=norm)
            self._product(ffn.up, x, up, norm=norm)
            row_ops.gate(h, up, ffn.activation)
        if ffn.act_scales is not None:
            parts.divide(h, ffn.act_scales)
        return h

    def _product(
        self, projection: Projection, x: Any, out: Any, *, norm: DeviceNorm | None = None, add: bool = False,
        ready: bool = False, then: DeviceNorm | None = None,
    ) -> None:  # fmt: skip
        """out = or += projection of norm(x), for norms that fold.

        ready: norm(x) lies in stream_operand. then: leave the operand of products of then(out) there.
        """
        weight, eps = _folded(norm)
        if self._products is not None:
            self._products.product(projection, x, out, norm=weight, eps=eps, add=add)
            return
        many = self.buffers.stream_operand if ready else self._batch_operand(int(x.shape[0]))
        emitted = None if then is None else (then.weight, self.buffers.stream_operand)
        for part in projection.parts:
            target = out[:, part.column : part.column + part.matvec.width]
            more: dict[str, Any] = {"operand": many, "ready": ready, "emitted": emitted}
            part.matvec(x, target, norm=weight, eps=eps, bias=part.bias, add=add, alpha=part.alpha, **more)

    def _left_behind(self, index: int) -> DeviceNorm | None:
        """The norm whose operand ffn_down of layer `index` leaves in stream_operand in this step; None if none."""
        return norm_behind(self.weights, index) if index >= 0 and self._hands_over else None

    def _left_inside(self, layer: DeviceLayer) -> DeviceNorm | None:  # likewise, of attn_output
        return norm_behind_attention(layer) if self._hands_over else None

    @property
    def _hands_over(self) -> bool:
        return FEW_ROWS < self._n <= MAX_ROWS and self._batch_operand(self._n) is not None

    def _batch_operand(self, n: int) -> Any:
        """Scratch memory that makes a product of n rows take the kernels for many; None for those for few."""
        many = self._batch_rows is not None and n >= self._batch_rows
        return self.buffers.batch_operand if many else None

    @staticmethod
    def _columns(buffer: Any, n: int, width: int) -> Any:
        """The first n * width floats of a buffer as (n, width), contiguous whatever the buffer's own width."""
        return buffer.reshape(-1)[: n * width].reshape(n, width)


class DecodeOps(CudaOps):
    """Bricks of a decode step: row b is slot b, one token each; tokens and positions lie in device memory.

    Args:
        weights: the model.
        buffers: activations.
        cache: keys and values.
        attention: the kernels of each shape.
        tokens: int32 (slots,), the token each slot is fed.
        positions: int32 (slots,), its position; -1 = the slot does not run.
        n: rows of this step, a prefix of the slots.
        batch_rows: from so many rows on, the kernels for many sequences; 1: always, so that bits never depend on n.
        sharing_rows: from so many rows on, those that chose an expert read it together; None: never, so that bits never
            depend on n.
        grouped: products for the experts of very many rows; None: none, for the same reason.
        expert_room: scratch memory of both.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        buffers: Activations,
        cache: PagedCache,
        attention: dict[AttentionShape, Attention],
        tokens: Any,
        positions: Any,
        n: int,
        *,
        batch_rows: int = BATCH_ROWS,
        sharing_rows: int | None = SHARING_ROWS,
        grouped: Products | None = None,
        expert_room: Any = None,
    ) -> None:
        super().__init__(weights, buffers, None)
        self._grouped = grouped if n >= GROUPED_ROWS else None
        self._shares = sharing_rows is not None and n >= sharing_rows
        self._expert_room = expert_room
        self._batch_rows = batch_rows
        self._cache = cache
        self._attention = attention
        self._tokens = tokens[:n]
        self._positions = positions[:n]
        self._table = cache.block_table[:n]
        self._n = n

    def begin(self, batch: Batch | None) -> None:
        """See Ops.begin; everything is on the device already."""

    def embed(self, batch: Batch | None) -> Any:
        """See Ops.embed."""
        x = self.buffers.x[: self._n]
        # Not launched early: the attention kernels read positions before their own wait.
        embed(self.weights.token_embd, self._tokens, x, scale=self.weights.embedding_scale, pdl=False)
        return self._finish_embedding(x, self._positions)

    def attn_qkv(self, layer: DeviceLayer, x: Any) -> Any:
        """Norm and projections; what is left of the brick is fused into attention()."""
        return self._qkv(layer, x, self._positions)

    def _gathers(self, moe: DeviceMoe) -> bool:
        return moe.products is not None

    def _groups(self, moe: DeviceMoe) -> bool:
        """Whether rows are grouped by expert, rather than that every row reads its own."""
        return self._grouped is not None and self._grouped.serves_experts(moe)

    def _score(self, moe: DeviceMoe, x: Any, scores: Any, norm: DeviceNorm | None) -> None:
        weight, eps = _folded(norm)
        few = not (self._groups(moe) or (self._shares and moe.sharing is not None))
        if not few or not router.serves(moe.router, x, weight):
            super()._score(moe, x, scores, norm)
        else:
            router.score_experts(moe.router, x, scores, norm=weight, eps=eps)

    def _mixture(self, moe: DeviceMoe, x: Any, norm: DeviceNorm | None, scores: Any, out: Any) -> None:
        """Only experts that rows chose are read, where their types allow it."""
        if moe.products is None:
            super()._mixture(moe, x, norm, scores, out)
            return
        n, buffers, positions, (weight, eps) = self._n, self.buffers, self._positions, _folded(norm)
        if self._groups(moe):
            assert self._grouped is not None
            shared = self._shared_hidden(moe, x, norm)  # reads x, which the experts may change
            room = self._expert_room
            self._grouped.experts(moe, x, scores, room, out, norm=weight, eps=eps, positions=positions)
        elif self._shares and moe.sharing is not None:
            shared = self._shared_hidden(moe, x, norm)
            moe.sharing(x, scores, self._expert_room, out, norm=weight, eps=eps, positions=positions)
        else:
            h = self._columns(buffers.hidden, n * moe.routing.n_used, moe.products.width)
            moe.products.gate_up(x, scores, h, norm=weight, eps=eps, positions=positions)
            shared = self._shared_hidden(moe, x, norm)
            moe.products.down(scores, h, out, positions=positions)
        if shared is not None:
            self._add_shared(moe, *shared, out)

    def attention(self, layer: DeviceLayer, q: Any) -> Any:
        """q/k norm, RoPE, cache append and attention."""
        shape = layer.shape
        out = self._columns(self.buffers.attention, self._n, shape.heads * shape.value_dim)
        keys, values = self._cache.keys[layer.index], self._cache.values[layer.index]
        self._attention[shape].decode(layer.attention, q, keys, values, self._table, self._positions, out)
        return out


class PrefillOps(CudaOps):
    """Bricks of a batch of prompt tokens, any number of rows of any number of sequences.

    Args:
        weights: the model.
        buffers: activations; they bound the rows of a batch.
        products: products of prompt rows.
        attention: the kernels of each shape.
        staging: the way to the device.

    Attributes:
        output_rows: int32 (R,), rows of the batch whose logits are wanted. output_slots: int32 (R,), their slots.
    """

    output_rows: Any
    output_slots: Any

    def __init__(
        self,
        weights: DeviceWeights,
        buffers: Activations,
        products: Products,
        attention: dict[AttentionShape, Attention],
        staging: Staging,
    ) -> None:
        super().__init__(weights, buffers, products)
        self._attention = attention
        self._staging = staging
        self._cache: PagedCache
        self._tiles: dict[int, Any] = {}

    def use(self, cache: PagedCache) -> None:
        """Chooses the cache that the following batches extend."""
        self._cache = cache

    def begin(self, batch: Batch) -> None:
        """See Ops.begin: everything that the batch needs from the host goes in one upload."""
        assert batch.n_tokens <= self.buffers.rows
        self._n = batch.n_tokens
        slots = np.zeros(self._n, np.int32)
        for span in batch.spans:
            slots[span.row : span.row + span.n_rows] = span.slot
        spans = [(span.row, span.n_rows, span.slot, span.n_past) for span in batch.spans]
        staging = self._staging
        staging.rewind()
        self._tokens = staging.place(batch.token_ids)
        self._positions = staging.place(batch.positions)
        self._slots = staging.place(slots)
        self.output_rows = staging.place(batch.output_rows)
        self.output_slots = staging.place(slots[batch.output_rows])
        heights = {kernels.tile_rows for kernels in self._attention.values()}
        self._tiles = {rows: staging.place(prefill_tiles(spans, rows)) for rows in heights}
        self._cache.flush(staging)
        staging.send()

    def embed(self, batch: Batch) -> Any:
        """See Ops.embed."""
        x = self.buffers.x[: self._n]
        embed(self.weights.token_embd, self._tokens, x, scale=self.weights.embedding_scale, pdl=False)
        return self._finish_embedding(x, self._positions)

    def attn_qkv(self, layer: DeviceLayer, x: Any) -> Any:
        """See LayerBricks.attn_qkv."""
        qkv = self._qkv(layer, x, self._positions)
        keys, values = self._cache.keys[layer.index], self._cache.values[layer.index]
        self._attention[layer.shape].rope_append(
            layer.attention, qkv, keys, values, self._cache.block_table, self._slots, self._positions
        )
        return qkv

    def attention(self, layer: DeviceLayer, q: Any) -> Any:
        """See LayerBricks.attention."""
        shape, kernels = layer.shape, self._attention[layer.shape]
        out = self._columns(self.buffers.attention, self._n, shape.heads * shape.value_dim)
        kernels.prefill(
            layer.attention,
            q,
            self._cache.keys[layer.index],
            self._cache.values[layer.index],
            self._cache.block_table,
            self._tiles[kernels.tile_rows],
            out,
        )
        return out
