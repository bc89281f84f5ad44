"""Residual connections that are more than a sum, from metadata."""

from __future__ import annotations

from engine.model.reading.metadata import LIMIT
from engine.model.reading.source import Source
from engine.model.skip_config import BankedSkip, HyperSkip, NormedSkip, SkipConfig, SkipKind

MOST_STREAMS = 64
"""Most streams of hyper-connections."""


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
    return None
