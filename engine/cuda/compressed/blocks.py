"""Launchers of the kernels of attention over a window and compressed blocks. They are the kernels' contract.

Letters as in plan.py, and T rows of a step, decode or prompt. All rows go the same way whatever the step: a row's bits
depend on its position and its sequence alone. Must not know of layers, batches or products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.cuda.attention.attention_shape import LayerAttention
from engine.cuda.attention.cache import BlockCache
from engine.cuda.compressed.plan import BlockShape
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.indexer.indexer import Choice, PickedAttention, Rows
from engine.cuda.indexer.plan import Ranges


@dataclass(frozen=True, eq=False)
class KeyArrays:
    """What makes one kind of keys of blocks: ape float32 (B, gates), weight float32 (W,) and epsilon of the norm."""

    ape: DeviceArray
    weight: DeviceArray
    epsilon: float


@dataclass(frozen=True, eq=False)
class BlockConstants:
    """What the kernels read of a layer.

    Attributes:
        keys: None where there are no blocks. index: None where no index chooses among them.
        inv_freq: float64 (rope_dim / 2,). rope_scale: factor of cos and sin.
        attention: scale and sinks.
    """

    keys: KeyArrays | None
    index: KeyArrays | None
    inv_freq: DeviceArray
    rope_scale: float
    attention: LayerAttention


class Blocks:
    """The kernels of one shape on the current device.

    Args:
        shape: the layer.
        ranges: how what a row sees is cut.
        context_length: positions of a sequence.
        memory: the arrays of indexer.plan.range_arrays().
        choice: scores and choices, where an index chooses, else None.
    """

    def __init__(
        self,
        shape: BlockShape,
        ranges: Ranges,
        context_length: int,
        memory: Mapping[str, DeviceArray],
        choice: Choice | None,
    ) -> None:
        (files, defines), self.shape, self.choice = shape.append_job(), shape, choice
        self._append = build(files, defines=defines).get("block_append")
        self._keys = None
        if shape.length:
            files, defines = shape.keys_job()
            self._keys = build(files, defines=defines).get("block_keys")
        self._attention = PickedAttention(shape.attention_jobs(), shape.attention, shape.tile, ranges, memory)
        self._count = shape.count(context_length)

    def append(
        self, keys: DeviceArray, left: DeviceArray, constants: BlockConstants, cache: BlockCache, rows: Rows
    ) -> None:
        """Caches keys and what blocks are made of, then the keys of blocks that become full; says which rows choose.

        Args:
            keys: float32 (T, Hd), normalized and rotated; rows contiguous, as those of left.
            left: float32 (T, shape.left), values and gates; gates without ape.
            constants: of the layer.
            cache: of the layer. A row goes to its position, or nowhere where that has no page.
            rows: of the step.
        """
        shape, own, index = self.shape, constants.keys, constants.index
        assert keys.shape[1] == shape.head and left.shape[1] == shape.left
        assert keys.strides[1] == 4 and (not shape.left or left.strides[1] == 4)
        kept = cache.left if shape.length else None
        apes = None if own is None else own.ape, None if index is None else index.ape
        given = (keys, keys.strides[0] // 4, cache.keys, left, left.strides[0] // 4, *apes, kept)
        choosing = None if self.choice is None else self.choice.choosing
        launch(self._append, rows.count, 128, (*given, *rows.table, rows.positions, choosing))
        if self._keys is None:
            return
        assert own is not None
        norms = (
            own.weight,
            float(own.epsilon),
            *((None, 0.0) if index is None else (index.weight, float(index.epsilon))),
        )
        caches = kept, cache.keys, None if index is None else cache.index_keys
        args = (*caches, *rows.table, rows.positions, *norms, constants.inv_freq, float(constants.rope_scale))
        launch(self._keys, (rows.count, 1 if index is None else 2), 256, args)

    def attend(
        self, qkv: DeviceArray, constants: BlockConstants, cache: BlockCache, rows: Rows, out: DeviceArray
    ) -> None:
        """out (T, H * Hd) = attention of all rows but padded ones; qkv float32 (T, row width) with rotated queries."""
        chosen = None if self.choice is None else self.choice.chosen
        picked = rows.positions, chosen, self._count
        self._attention.attend(constants.attention, qkv, (cache.keys, cache.keys), rows, picked, out)
