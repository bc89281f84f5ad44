"""Scratch memory of indexers and compressed blocks, from the launch plan: what is allocated, and counted in plans."""

from __future__ import annotations

from engine.config import PAGE
from engine.cuda.attention.attention_shape import AttentionShape
from engine.cuda.compressed.plan import BlockShape
from engine.cuda.indexer.plan import (
    Arrays,
    IndexerShape,
    Ranges,
    choice_arrays,
    head_tile,
    n_bytes,
    range_arrays,
    ranges_of,
    scored_rows,
)
from engine.cuda.launch_plan.model import LaunchPlan


def all_choice_arrays(plan: LaunchPlan, context_length: int) -> dict[IndexerShape, Arrays]:
    """The arrays of every kind of indexer; layers of one kind share them."""
    rows = plan.decode_rows, plan.settings.prefill_rows
    return {shape: choice_arrays(shape, *rows, context_length) for shape in _index_shapes(plan)}


def _index_shapes(plan: LaunchPlan) -> list[IndexerShape]:
    """Each once."""
    indexes = (shape.index for shape in plan.block_shapes)
    found = (*(one.shape for one in plan.indexers), *(index for index in indexes if index is not None))
    return list(dict.fromkeys(found))


def block_ranges(plan: LaunchPlan, context_length: int) -> dict[BlockShape, Ranges]:
    """How what a row sees of a window and of blocks is cut."""
    return {shape: shape.ranges(context_length, plan.card.multiprocessors) for shape in plan.block_shapes}


def identity_rows(plan: LaunchPlan) -> int:
    """Rows that attention over compressed blocks has numbered; 0 without it."""
    return plan.decode_rows if plan.block_shapes else 0


def all_ranges(plan: LaunchPlan, context_length: int) -> dict[tuple[IndexerShape, AttentionShape], Ranges]:
    """How chosen positions are cut, for every pair of indexer and heads."""
    return {
        (one.shape, one.attention): ranges_of(
            one.shape, one.attention, head_tile(one.attention), context_length, plan.card.multiprocessors
        )
        for one in plan.indexers
    }


def indexer_bytes(plan: LaunchPlan, context_length: int) -> int:
    """All of it."""
    choices = sum(n_bytes(arrays) for arrays in all_choice_arrays(plan, context_length).values())
    parts = [(heads, ranges) for (_, heads), ranges in all_ranges(plan, context_length).items()]
    parts += [(shape.attention, ranges) for shape, ranges in block_ranges(plan, context_length).items()]
    return choices + sum(n_bytes(range_arrays(*part)) for part in parts) + 4 * identity_rows(plan)


def indexer_bytes_per_page(plan: LaunchPlan) -> int:
    """What a longer context takes more, for each of its pages."""
    rows, shapes = scored_rows(plan.decode_rows), _index_shapes(plan)
    return sum(4 * rows * shape.choices * -(-PAGE // shape.block) for shape in shapes)
