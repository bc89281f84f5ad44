"""Scratch memory of indexers, from the launch plan: what is allocated and what the memory plan counts."""

from __future__ import annotations

from engine.config import PAGE
from engine.cuda.attention.attention_shape import AttentionShape
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
    return {one.shape: choice_arrays(one.shape, *rows, context_length) for one in plan.indexers}


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
    pairs = all_ranges(plan, context_length).items()
    return choices + sum(n_bytes(range_arrays(heads, ranges)) for (_, heads), ranges in pairs)


def indexer_bytes_per_page(plan: LaunchPlan) -> int:
    """What a longer context takes more, for each of its pages."""
    rows, shapes = scored_rows(plan.decode_rows), {one.shape for one in plan.indexers}
    return sum(4 * rows * shape.choices * -(-PAGE // shape.block) for shape in shapes)
