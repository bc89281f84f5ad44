"""The bricks of a batch of prompt tokens, any number of rows of any number of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.cuda.attention.attention import Attention, AttentionShape, prefill_tiles
from engine.cuda.attention.cache import PagedCache, TextCache
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.staging import Staging, gather_rows
from engine.cuda.indexer.indexer import Rows
from engine.cuda.launch_plan.families import Family, Phase
from engine.cuda.load.buffers import Activations
from engine.cuda.load.device_weights import DeviceLayer, DeviceMoe, DeviceWeights
from engine.cuda.matrix.gemm import Operand
from engine.cuda.recurrent.rows import PromptRows
from engine.cuda.recurrent.state_cache import StateCache
from engine.cuda.step.bricks.mixture import MoeInputs
from engine.cuda.step.folding import Hidden, Shared, columns_of, rows_of
from engine.cuda.step.indexer import Indexers, choose
from engine.cuda.step.moves import Moves, state_spans
from engine.cuda.step.ops import CudaOps
from engine.cuda.step.prompt_products import PromptProducts
from engine.model.batch import Batch

TileSpan = tuple[int, int, int, int]
"""First row, rows, slot, position of the first row: see attention.prefill_tiles."""


class PromptOps(CudaOps):
    """Implements HiddenOps for prompts.

    Args:
        weights: the model.
        buffers: activations; they bound the rows of a batch.
        products: products of prompt rows.
        attention: the kernels of each shape.
        indexers: choices of positions.
        staging: the way to the device.

    Attributes:
        output_rows: int32 (R,), rows of the batch whose logits are wanted. output_slots: int32 (R,), their slots.
    """

    # Rows that the last layer goes on with behind its keys and values: those of output_rows; None: with all.
    _wanted: int | None = None

    output_rows: DeviceArray
    output_slots: DeviceArray

    def __init__(
        self,
        weights: DeviceWeights,
        buffers: Activations,
        products: PromptProducts,
        attention: dict[AttentionShape, Attention],
        indexers: Indexers,
        staging: Staging,
    ) -> None:
        import cupy

        super().__init__(weights, buffers, products, weights.plan.step(Phase.PROMPT, buffers.rows))
        self._grouped = products.grouped
        self._attention, self._indexers = attention, indexers
        self._staging = staging
        self._cache: PagedCache | TextCache
        self._states: StateCache | None
        # By rows of a tile, and by up to how many positions all are attended to where an indexer chooses among more.
        self._tiles: dict[tuple[int, int | None], DeviceArray] = {}
        mixers = (layer.attention for layer in weights.plan.layers)
        tilings = ((attention[mixer.shape].tile_rows, mixer.all_chosen) for mixer in mixers if mixer is not None)
        self._tilings = list(dict.fromkeys(tilings))
        self._last_tiles: DeviceArray | None = None
        self._state_sizes: tuple[int, ...] = ()  # of the tables of recurrent layers
        self._last: DeviceArray = cupy.empty((weights.plan.decode_rows, weights.plan.width), cupy.float32)

    def use(self, cache: PagedCache | TextCache, states: StateCache | None) -> None:
        """Chooses the caches that the following batches extend; states: None where the model has none."""
        self._cache, self._states = cache, states

    def begin(self, batch: Batch, *, narrow: bool = False) -> None:
        """See Ops.begin: everything that the batch needs from the host goes in one upload.

        narrow: the stream behind the layers is needed of the batch's output rows alone.
        """
        n = batch.n_tokens
        assert n <= self.buffers.rows
        self._wanted = None
        if narrow and self.weights.plan.narrows and len(batch.output_rows) < n:
            self._wanted = len(batch.output_rows)
        slots = np.zeros(n, np.int32)
        for span in batch.spans:
            slots[span.row : span.row + span.n_rows] = span.slot
        spans = [(span.row, span.n_rows, span.slot, span.n_past) for span in batch.spans]
        staging = self._staging
        staging.rewind()
        tiles = [prefill_tiles(up_to(limit, spans), rows) for rows, limit in self._tilings]
        if self._wanted:
            rows, places = batch.output_rows.tolist(), batch.positions
            tiles.append(prefill_tiles([(row, 1, int(slots[row]), int(places[row])) for row in rows], 1))
        output_slots = slots[batch.output_rows]
        inputs = [batch.token_ids, batch.positions, slots, batch.output_rows, output_slots, *tiles]
        self._tokens, self._positions, self._slots, self.output_rows, self.output_slots, *placed = staging.place_all(
            inputs
        )
        self._tiles = dict(zip(self._tilings, placed, strict=False))  # and, behind them, the rows that are wanted
        if self._wanted:
            self._last_tiles = placed[-1]
        self._moves, self._state_sizes = None, ()
        if self._states is not None:
            table = state_spans(batch.spans, self._states.rows)
            moved = PromptRows.of(table, staging.place)
            self._moves, self._state_sizes = Moves(self._states, moved, self.buffers, self._product), moved.sizes
        self._cache.flush(staging)
        staging.send()

    @property
    def shape(self) -> tuple[int, ...]:
        """What decides the launches of the batch that was begun: all sizes, and with them the places in the arena."""
        tiles = (len(tiles) for tiles in self._tiles.values())
        return (len(self._tokens), len(self.output_rows), self._wanted is None, *tiles, *self._state_sizes)

    def embed(self, batch: Batch) -> DeviceArray:
        """See Ops.embed. First of all launches of a batch, also where they are made anew."""
        self.step = self.weights.plan.step(Phase.PROMPT, len(self._tokens))
        return self._embed(self._tokens, self._positions)

    def attn_qkv(self, layer: DeviceLayer, x: DeviceArray) -> DeviceArray:
        """See LayerBricks.attn_qkv."""
        qkv = self._qkv(layer, x, self._positions)
        if layer.compressed is not None:
            return qkv
        mixer = layer.attention
        keys, values = self._cache.arrays(layer.index)
        self._attention[mixer.shape].rope_append(
            mixer.constants, qkv, keys, values, self._cache.block_table, self._slots, self._positions
        )
        return qkv

    def attention(self, layer: DeviceLayer, q: DeviceArray) -> Hidden:
        """See LayerBricks.attention."""
        if layer.compressed is not None:
            assert isinstance(self._cache, PagedCache), "models that make embeddings alone have no blocks"
            rows = Rows(self._positions, self._cache.block_table, self._slots)
            return self._attend_blocks(layer.compressed, q, self._cache.blocks(layer.index), rows)
        mixer = layer.attention
        shape, kernels, indexer = mixer.shape, self._attention[mixer.shape], mixer.plan.indexer
        out, caches = (
            columns_of(self.buffers.attention, self.n_rows, shape.heads * shape.value_dim),
            self._cache.arrays(layer.index),
        )
        rows = Rows(self._positions, self._cache.block_table, self._slots)
        if mixer.indexer is not None:
            assert isinstance(self._cache, PagedCache), "models that make embeddings alone have no indexers"
            choice = self._indexers.choice(mixer.indexer.plan)
            choose(mixer.indexer, self.buffers, choice, self._cache.index_keys(layer.index), rows)
        tiles, operand = self._tiles[kernels.tile_rows, mixer.plan.all_chosen], None
        if self._narrows(layer):
            if not self._wanted:
                return out
            assert self._last_tiles is not None
            tiles = self._last_tiles
        elif mixer.plan.prompts_leave_operand:
            assert self.buffers.operand is not None
            operand = Operand(self.buffers.operand, self.n_rows, int(out.shape[1]))
        table, lengths = self._cache.block_table, self._cache.lengths
        kernels.prefill(mixer.constants, q, *caches, table, tiles, out, lengths=lengths, operand=operand)
        if indexer is not None:
            self._indexers.attention(indexer)(mixer.constants, q, *caches, rows, out)
        return out if operand is None else operand

    def attn_output(self, layer: DeviceLayer, a: Hidden, x: DeviceArray) -> DeviceArray:
        """See LayerBricks.attn_output. Of the last layer the rows that are wanted go on alone."""
        if not self._narrows(layer):
            return super().attn_output(layer, a, x)
        if not self._wanted:
            return x
        rows = rows_of(a)
        few = columns_of(self.buffers.qkv, self._wanted, int(rows.shape[1]))  # queries were read by attention
        gather_rows(rows, self.output_rows, few)
        x = self.output_states(x)
        self.step = replace(self.step, n_rows=self._wanted, gathered=True)
        return super().attn_output(layer, few, x)

    def feed_forward(self, layer: DeviceLayer, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        """See Ops.feed_forward."""
        return x if self._narrows(layer) and not self._wanted else super().feed_forward(layer, x, y)

    def output_states(self, x: DeviceArray) -> DeviceArray:
        """Rows of x whose logits are wanted (R, D); x is what embed() or the last layer gave."""
        n = len(self.output_rows)
        if self.step.gathered:
            return x
        gather_rows(x, self.output_rows, self._last[:n])
        return self._last[:n]

    def _narrows(self, layer: DeviceLayer) -> bool:
        """Whether the layer goes on with the wanted rows alone."""
        return self._wanted is not None and layer.index == len(self.weights.layers) - 1

    def _own_experts(self, moe: DeviceMoe, family: Family, inputs: MoeInputs, out: DeviceArray) -> Shared | None:
        assert family is Family.EXPERTS_GROUPED
        shared, (x, norm) = self._shared_hidden(moe, inputs), inputs.experts
        self._grouped(moe, x, inputs.scores, self.buffers.expert_room, out, norm)
        return shared


def up_to(limit: int | None, spans: Sequence[TileSpan]) -> list[TileSpan]:
    """The rows of spans, as prefill_tiles() takes them, at the first `limit` positions; None: all."""
    if limit is None:
        return list(spans)
    return [(row, min(n_rows, limit - n_past), slot, n_past) for row, n_rows, slot, n_past in spans if n_past < limit]
