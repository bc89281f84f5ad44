"""Residual connections that are more than a sum, from metadata."""

from __future__ import annotations

from engine.errors import ModelFileError
from engine.model.config import (
    BankedSkip,
    GatedSkip,
    HyperSkip,
    MixedSkip,
    NormedSkip,
    SkipConfig,
    SkipKind,
    StackSkip,
)
from engine.model.reading.metadata import LIMIT
from engine.model.reading.source import Source

MOST_STREAMS = 64
"""Most streams of hyper-connections."""
MOST_ITERATIONS = 1000


def read_skip(source: Source) -> SkipConfig | None:
    """The kind that the family declares; None = a part's result is added to what it read.

    Raises:
        ModelFileError: a key is missing or has an impossible value.
    """
    kind, read = source.architecture.layer.skip, source.read
    if kind is SkipKind.NORMED_SKIP:
        return NormedSkip(scale=read.number("residual_scale", low=-LIMIT, high=LIMIT))
    if kind is SkipKind.BANKED:
        block = read.integer("attn_res.block_size", 0, low=0)
        return BankedSkip(block=block) if block else None
    if kind is SkipKind.HYPER:
        return HyperSkip(
            count=read.integer("hyper_connection.count", low=2, high=MOST_STREAMS),
            rank=read.integer("hyper_connection.low_rank"),
        )
    if kind is SkipKind.GATED:
        return GatedSkip(
            count=read.integer("hyper_connection.count", low=2, high=MOST_STREAMS),
            epsilon=read.number("hyper_connection.epsilon", low=0.0, high=1.0),
            magnitude=read.number("hyper_connection.magnitude", low=-LIMIT, high=LIMIT),
        )
    if kind in (SkipKind.MIXED, SkipKind.MIXED_AND_WEIGHTED):
        return MixedSkip(
            count=read.integer("hyper_connection.count", low=2, high=MOST_STREAMS),
            epsilon=read.number("hyper_connection.epsilon", low=0.0, high=1.0),
            iterations=read.integer("hyper_connection.sinkhorn_iterations", high=MOST_ITERATIONS),
            weighted_head=kind is SkipKind.MIXED_AND_WEIGHTED,
        )
    if kind is SkipKind.STACKS:
        return _stacks(source)
    return None


def _stacks(source: Source) -> StackSkip:
    names = ("layers_per_stack", "l_cycles", "h_cycles")
    layers, low, cycles = (source.read.integer(f"hrm.{name}", high=source.n_layers) for name in names)
    skip = StackSkip(layers=layers, low=low, cycles=cycles)
    if skip.n_layers != source.n_layers:
        raise ModelFileError(
            f"block_count is {source.n_layers}, hrm.layers_per_stack {layers}, hrm.l_cycles {low} and hrm.h_cycles "
            f"{cycles}; allowed is layers_per_stack · (l_cycles + 1) · h_cycles, the layers that a token passes"
        )
    return skip
