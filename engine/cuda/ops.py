"""The bricks of a forward pass on the GPU, for decode steps and for prompts.

Every brick is a fixed sequence of launches into preallocated buffers; lengths and positions are read from device
memory, so a decode step can be captured once and replayed for every length. Must not know of requests or sampling.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.cuda import rows as row_ops
from engine.cuda.attention import Attention, AttentionShape, prefill_tiles
from engine.cuda.buffers import Activations
from engine.cuda.cache import PagedCache
from engine.cuda.dense import DenseProduct
from engine.cuda.dequant import embed
from engine.cuda.matvec import MAX_COLUMNS
from engine.cuda.staging import Staging
from engine.cuda.weights import DeviceFfn, DeviceLayer, DeviceWeights, Projection
from engine.gguf.types import GGMLType
from engine.model.batch import Batch

ALWAYS = 1 << 30
"""As matvec_rows: every product reads the packed weights by the decode kernels."""


def padded_rows(n: int) -> int:
    """Rows that n rows of logits are computed with: filled up, so that few kernels serve all numbers."""
    return n if n == 1 else -(-n // MAX_COLUMNS) * MAX_COLUMNS


class CudaOps:
    """What decode and prefill share: products with norm, activation and residual folded in.

    Args:
        weights: the model.
        buffers: activations with room for every row of a batch.
        dense: products of prompts; None where no batch has more than matvec_rows rows.
        matvec_rows: up to so many rows are multiplied by the decode kernels. Prompts have 0 and decode steps ALWAYS: a
            token's bits must depend on what it is, not on how many come with it.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        buffers: Activations,
        dense: DenseProduct | None,
        *,
        matvec_rows: int,
    ) -> None:
        self.weights = weights
        self.buffers = buffers
        self._dense = dense
        self._matvec_rows = matvec_rows
        self._n = 0

    def attn_output(self, layer: DeviceLayer, a: Any, x: Any) -> Any:
        """See Ops.attn_output."""
        self._product(layer.output, a, x, add=True)
        return x

    def ffn_gate_up(self, layer: DeviceLayer, x: Any) -> Any:
        """See Ops.ffn_gate_up."""
        assert layer.ffn is not None
        return self._gate_up(layer.ffn, x, layer.ffn_norm)

    def ffn_down(self, layer: DeviceLayer, h: Any, x: Any) -> Any:
        """See Ops.ffn_down."""
        assert layer.ffn is not None
        self._product(layer.ffn.down, h, x, add=True)
        return x

    def ffn_moe(self, layer: DeviceLayer, x: Any) -> Any:
        """See Ops.ffn_moe. Every expert runs over all rows; the weights of those a row did not choose are zero."""
        moe, n = layer.moe, self._n
        assert moe is not None
        config = moe.config
        scores, routing = self.buffers.router[:n], self.buffers.routing[:n]
        normed_by = layer.ffn_norm
        self._product(moe.router, x, scores, norm=normed_by)
        row_ops.route(
            scores,
            routing,
            n_experts=config.n_experts,
            n_used=config.n_used,
            normalize=config.normalize,
            weight_scale=config.weight_scale,
        )
        y = self.buffers.y[:n]
        # The sum goes beside x, which every expert still reads through its norm.
        total = self.buffers.total[:n]
        row_ops.copy(x, total)
        for index, expert in enumerate(moe.experts):
            h = self._gate_up(expert, x, normed_by)
            self._product(expert.down, h, y)
            row_ops.add_scaled(total, y, routing, index)
        if moe.shared is not None:
            h = self._gate_up(moe.shared, x, normed_by)
            self._product(moe.shared.down, h, y)
            mix = None
            if moe.shared_gate is not None:
                mix = self.buffers.mix[:n]
                self._product(moe.shared_gate, x, mix, norm=normed_by)
                row_ops.sigmoid(mix)
            row_ops.add_scaled(total, y, mix, 0)
        row_ops.copy(total, x)
        return x

    def logits(self, x: Any, out: Any) -> None:
        """Final norm and output projection of rows x (R, D) into out (R, V); of prompts too by the decode kernels."""
        self._product(self.weights.output, x, out, norm=self.weights.output_norm, packed=True)

    def _gate_up(self, ffn: DeviceFfn, x: Any, norm: Any) -> Any:
        n = int(x.shape[0])
        h, up = self._columns(self.buffers.gate, n, ffn.width), self._columns(self.buffers.up, n, ffn.width)
        if ffn.paired is not None:
            if n <= self._matvec_rows:
                ffn.paired(x, h, norm=norm, eps=self.weights.epsilon, activation=ffn.activation)
                return h
            assert self._dense is not None
            matrix = ffn.paired.matrices[0]
            operand = self._operand(x, matrix.type, norm)
            self._dense(matrix, operand, h, second=up)
            row_ops.gate(h, up, ffn.activation)
            return h
        assert ffn.up is not None
        if ffn.gate is None:
            self._product(ffn.up, x, h, norm=norm)
            row_ops.gate(h, None, ffn.activation)
            return h
        self._product(ffn.gate, x, h, norm=norm)
        self._product(ffn.up, x, up, norm=norm)
        row_ops.gate(h, up, ffn.activation)
        return h

    def _product(
        self, projection: Projection, x: Any, out: Any, *, norm: Any = None, add: bool = False, packed: bool = False
    ) -> None:
        """out = or += projection of norm(x); packed: by the decode kernels, whatever matvec_rows says."""
        if packed or x.shape[0] <= self._matvec_rows:
            for part in projection.parts:
                part.matvec(
                    x,
                    out[:, part.column : part.column + part.matvec.width],
                    norm=norm,
                    eps=self.weights.epsilon,
                    bias=part.bias,
                    add=add,
                    alpha=part.alpha,
                )
            return
        assert self._dense is not None
        operands: dict[bool, Any] = {}
        for part in projection.parts:
            column = part.column
            for matrix in part.matvec.matrices:
                wide = matrix.type is GGMLType.F32
                if wide not in operands:
                    operands = {wide: self._operand(x, matrix.type, norm)}  # one buffer: the other kind is overwritten
                self._dense(matrix, operands[wide], out[:, column : column + matrix.rows], alpha=part.alpha, add=add)
                column += matrix.rows
            if part.bias is not None:
                row_ops.add_bias(out[:, part.column : part.column + part.matvec.width], part.bias, part.alpha)

    def _operand(self, x: Any, type: GGMLType, norm: Any) -> Any:
        """norm(x) (or x) as the contiguous left operand of a dense product with a matrix of that type."""
        import cupy

        dtype = cupy.dtype(cupy.float32 if type is GGMLType.F32 else cupy.float16)
        n, k = x.shape
        assert self.buffers.operand is not None
        operand = self.buffers.operand[: n * k * dtype.itemsize].view(dtype).reshape(n, k)
        row_ops.normalize(x, operand, norm, self.weights.epsilon)
        return operand

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
    ) -> None:
        super().__init__(weights, buffers, None, matvec_rows=ALWAYS)
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
        embed(self.weights.token_embd, self._tokens, x, pdl=False)
        return x

    def attn_qkv(self, layer: DeviceLayer, x: Any) -> Any:
        """Norm and projections; the rest of the brick is fused into attention()."""
        qkv = self._columns(self.buffers.qkv, self._n, layer.qkv.width)
        self._product(layer.qkv, x, qkv, norm=layer.attn_norm)
        return qkv

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
        dense: products of many rows.
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
        dense: DenseProduct,
        attention: dict[AttentionShape, Attention],
        staging: Staging,
    ) -> None:
        super().__init__(weights, buffers, dense, matvec_rows=0)
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
        embed(self.weights.token_embd, self._tokens, x, pdl=False)
        return x

    def attn_qkv(self, layer: DeviceLayer, x: Any) -> Any:
        """See Ops.attn_qkv."""
        qkv = self._columns(self.buffers.qkv, self._n, layer.qkv.width)
        self._product(layer.qkv, x, qkv, norm=layer.attn_norm)
        keys, values = self._cache.keys[layer.index], self._cache.values[layer.index]
        self._attention[layer.shape].rope_append(
            layer.attention, qkv, keys, values, self._cache.block_table, self._slots, self._positions
        )
        return qkv

    def attention(self, layer: DeviceLayer, q: Any) -> Any:
        """See Ops.attention."""
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
