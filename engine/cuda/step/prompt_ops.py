"""The bricks of a batch of prompt tokens, any number of rows of any number of sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.cuda.attention.attention import Attention, AttentionShape, prefill_tiles
from engine.cuda.attention.cache import PagedCache, TextCache
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.staging import Staging
from engine.cuda.indexer.indexer import Rows
from engine.cuda.launch_plan.families import Family, Phase
from engine.cuda.load.buffers import Activations
from engine.cuda.load.device_weights import DeviceLayer, DeviceMoe, DeviceWeights
from engine.cuda.recurrent.rows import PromptRows
from engine.cuda.recurrent.state_cache import StateCache
from engine.cuda.step.bricks.mixture import MoeInputs
from engine.cuda.step.folding import Shared, columns_of
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
        super().__init__(weights, buffers, products, weights.plan.step(Phase.PROMPT, buffers.rows))
        self._grouped = products.grouped
        self._attention, self._indexers = attention, indexers
        self._staging = staging
        self._cache: PagedCache | TextCache
        self._states: StateCache | None
        # By rows of a tile, and by up to how many positions all are attended to where an indexer chooses among more.
        self._tiles: dict[tuple[int, int | None], DeviceArray] = {}
        mixers = (layer.attention for layer in weights.plan.layers)
        self._tilings = {(attention[mixer.shape].tile_rows, mixer.all_chosen) for mixer in mixers if mixer is not None}
        self._state_sizes: tuple[int, ...] = ()  # of the tables of recurrent layers

    def use(self, cache: PagedCache | TextCache, states: StateCache | None) -> None:
        """Chooses the caches that the following batches extend; states: None where the model has none."""
        self._cache, self._states = cache, states

    def begin(self, batch: Batch) -> None:
        """See Ops.begin: everything that the batch needs from the host goes in one upload."""
        n = batch.n_tokens
        assert n <= self.buffers.rows
        self.step = self.weights.plan.step(Phase.PROMPT, n)
        slots = np.zeros(n, np.int32)
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
        self._tiles = {
            (rows, limit): staging.place(prefill_tiles(up_to(limit, spans), rows)) for rows, limit in self._tilings
        }
        self._moves, self._state_sizes = None, ()
        if self._states is not None:
            table = state_spans(batch.spans, self._states.rows)
            rows = PromptRows.of(table, staging.place)
            self._moves, self._state_sizes = Moves(self._states, rows, self.buffers, self._product), rows.sizes
        self._cache.flush(staging)
        staging.send()

    @property
    def shape(self) -> tuple[int, ...]:
        """What decides the launches of the batch that was begun: all sizes, and with them the places in the arena."""
        tiles = (len(tiles) for tiles in self._tiles.values())
        return (self.n_rows, len(self.output_rows), *tiles, *self._state_sizes)

    def embed(self, batch: Batch) -> DeviceArray:
        """See Ops.embed."""
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

    def attention(self, layer: DeviceLayer, q: DeviceArray) -> DeviceArray:
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
        kernels.prefill(
            mixer.constants,
            q,
            *caches,
            self._cache.block_table,
            self._tiles[kernels.tile_rows, mixer.plan.all_chosen],
            out,
            lengths=self._cache.lengths,
        )
        if indexer is not None:
            self._indexers.attention(indexer)(mixer.constants, q, *caches, rows, out)
        return out

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
