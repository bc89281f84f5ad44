"""The indexer of a layer between the layer's norm and its choice of positions, in decode steps and in prompts.

Queries, weights and keys are products of what the layer reads; the kernels of engine/cuda/indexer do the rest. Must not
know of batches.
"""

from __future__ import annotations

from typing import Protocol

from engine.cuda.compressed.blocks import Blocks
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.indexer.indexer import Choice, ChosenAttention, Rows, Scored, allocate
from engine.cuda.indexer.plan import head_tile, range_arrays, scored_rows
from engine.cuda.launch_plan.model import LaunchPlan
from engine.cuda.launch_plan.parts.compressed import CompressedPlan
from engine.cuda.launch_plan.parts.indexer import IndexerPlan
from engine.cuda.launch_plan.scratch import all_choice_arrays, all_ranges, block_ranges, identity_rows
from engine.cuda.load.device_weights import DeviceIndexer
from engine.cuda.rows import parts
from engine.cuda.rows.parts import DeviceNorm
from engine.cuda.step.folding import columns_of
from engine.cuda.step.latent import Product


class IndexBuffers(Protocol):
    """Scratch memory, float32, one row for each row of a batch: see load.buffers.Activations."""

    index_inputs: DeviceArray
    index_queries: DeviceArray


class Indexers:
    """Choices and kernels of all layers of a model, those of compressed blocks included, with their memory.

    Args:
        plan: of the model.
        context_length: positions of a sequence.

    Attributes:
        identity: int32, numbers of the rows of decode steps, where layers have compressed blocks, else None.
    """

    def __init__(self, plan: LaunchPlan, context_length: int) -> None:
        at_once = scored_rows(plan.decode_rows)
        self._choices = {
            shape: Choice(shape, allocate(arrays), at_once)
            for shape, arrays in all_choice_arrays(plan, context_length).items()
        }
        self._attention = {
            (shape, heads): ChosenAttention(
                self._choices[shape], heads, head_tile(heads), ranges, allocate(range_arrays(heads, ranges))
            )
            for (shape, heads), ranges in all_ranges(plan, context_length).items()
        }
        self._blocks = {
            shape: Blocks(
                shape,
                ranges,
                context_length,
                allocate(range_arrays(shape.attention, ranges)),
                None if shape.index is None else self._choices[shape.index],
            )
            for shape, ranges in block_ranges(plan, context_length).items()
        }
        self.identity = allocate({"identity": (rows,)})["identity"] if (rows := identity_rows(plan)) else None

    def blocks(self, plan: CompressedPlan) -> Blocks:
        """The kernels of a layer with compressed blocks."""
        return self._blocks[plan.shape]

    def choice(self, plan: IndexerPlan) -> Choice:
        """What the rows of a step attend to in a layer with such an indexer."""
        return self._choices[plan.shape]

    def attention(self, plan: IndexerPlan) -> ChosenAttention:
        """Attends to it."""
        return self._attention[plan.shape, plan.attention]


def index_inputs(
    indexer: DeviceIndexer,
    product: Product,
    x: DeviceArray,
    norm: DeviceNorm | None,
    low_rank: DeviceArray | None,
    buffers: IndexBuffers,
    positions: DeviceArray,
) -> None:
    """Queries, weights and keys of all rows, in the buffers, from where scored() takes them.

    Args:
        indexer: the weights, of a layer with an indexer of its own.
        product: multiplies.
        x: float32 (T, D).
        norm: what products apply to x.
        low_rank: float32 (T, q_rank), normalized queries before their expansion; None without latent attention.
        buffers: index_inputs and index_queries are written.
        positions: int32 (T,).
    """
    n, shape = int(positions.size), indexer.plan.shape
    product(indexer.inputs, x, columns_of(buffers.index_inputs, n, indexer.inputs.width), norm=norm)
    if indexer.queries is not None:
        assert low_rank is not None
        product(indexer.queries, low_rank, columns_of(buffers.index_queries, n, indexer.queries.width))
    found, keys = scored(indexer, buffers, n)
    if indexer.q_norm is not None:
        parts.normalize(found.q, found.q, indexer.q_norm, pieces=shape.heads)
    raw, keys = indexer.raw_keys, keys[:, : shape.width]
    if not raw:
        parts.normalize(keys, keys, indexer.k_norm)
    if indexer.rope is not None:
        first = shape.width - indexer.rope.n_rot if indexer.rotated_last else 0
        queries = found.q.reshape(n, shape.heads, shape.width)[:, :, first:]
        parts.rotate(queries, queries, indexer.rope, positions)
        if not raw:
            turned = keys[:, None, first:]
            parts.rotate(turned, turned, indexer.rope, positions)


def scored(indexer: DeviceIndexer, buffers: IndexBuffers, n: int) -> tuple[Scored, DeviceArray]:
    """What index_inputs() has left of n rows: queries and weights, and what is cached of each."""
    shape, inputs = indexer.plan.shape, columns_of(buffers.index_inputs, n, indexer.inputs.width)
    if indexer.queries is None:
        end = shape.heads * shape.width
        return Scored(inputs[:, :end], None, indexer.pool), inputs[:, end:]
    queries, cached = columns_of(buffers.index_queries, n, indexer.queries.width), shape.cached_width
    return Scored(queries, inputs[:, cached:], indexer.pool), inputs[:, :cached]


def choose(indexer: DeviceIndexer, buffers: IndexBuffers, choice: Choice, cache: DeviceArray, rows: Rows) -> None:
    """Caches the keys of the rows, and chooses for those that do not attend to all positions."""
    found, keys = scored(indexer, buffers, rows.count)
    choice.append(keys, cache, rows)
    choice.choose(found, cache, rows)
