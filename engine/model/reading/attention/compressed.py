"""Attention over a window and compressed blocks, of one layer, from metadata."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import ModelFileError, UnsupportedModelError
from engine.model.config import BlockIndexConfig, BlocksConfig, CompressedConfig, RopeConfig, RopeScaling
from engine.model.reading.metadata import LIMIT
from engine.model.reading.source import Source

RATIOS = "attention.compress_ratios"
INDEXED = 4
"""Length of blocks that overlap and have an index."""
WHOLE = 128
"""Length of blocks of which every query sees all."""


def read_compressed(source: Source, index: int, heads: int, kv_heads: int, rope: RopeConfig | None) -> CompressedConfig:
    """What layer `index` states, which has heads of the rotation `rope`.

    Raises:
        ModelFileError, UnsupportedModelError: a key is missing or has a value that is impossible or not supported.
    """
    read = source.read
    groups = read.integer("attention.output_group_count", high=heads)
    if heads % groups or kv_heads != 1:
        raise ModelFileError(
            f"layer {index} has {heads} heads in {groups} groups (attention.output_group_count) and {kv_heads} "
            "key/value heads; allowed are groups of equal size and 1 key/value head"
        )
    return CompressedConfig(
        q_rank=read.integer("attention.q_lora_rank"),
        groups=groups,
        output_rank=read.integer("attention.output_lora_rank"),
        blocks=_blocks(source, _ratio(source, index), 0 if rope is None else rope.n_rot),
    )


def block_rope(source: Source, index: int, rope: RopeConfig) -> RopeConfig:
    """Rotation of layer `index`: stretched, with a base of its own, where it has blocks, else as trained.

    What YaRN would multiply cos and sin by is left out.
    """
    if _ratio(source, index) == 0:
        return replace(rope, scaling=RopeScaling.NONE, factor=1.0, attention_factor=1.0)
    key = "attention.compress_rope_freq_base"
    base = source.read.number(key, high=LIMIT**4)
    if base <= 1.0:
        raise ModelFileError(f"metadata key {source.name}.{key} is {base:g}; allowed is a number above 1")
    return replace(rope, base=base, attention_factor=1.0, log_multiplier=1.0)


def _ratio(source: Source, index: int) -> int:
    ratios = source.read.integers(RATIOS, low=0)  # files may have some for layers that they lack
    if index >= len(ratios):
        raise ModelFileError(
            f"metadata key {source.name}.{RATIOS} holds {len(ratios)} values; allowed are {source.n_layers} or more, "
            "one per layer"
        )
    ratio = ratios[index]
    if ratio not in (0, INDEXED, WHOLE):
        raise UnsupportedModelError(
            f"{source.name}.{RATIOS} of layer {index} is {ratio}; supported are 0 (no blocks), {INDEXED} and {WHOLE}"
        )
    return ratio


def _blocks(source: Source, ratio: int, n_rot: int) -> BlocksConfig | None:
    if ratio == 0:
        return None
    if ratio == WHOLE:
        return BlocksConfig(length=ratio, overlap=False, index=None)
    index = BlockIndexConfig(
        heads=source.read.integer("attention.indexer.head_count"),
        width=source.read.integer("attention.indexer.key_length", low=max(1, n_rot)),
        top_k=source.read.integer("attention.indexer.top_k"),
    )
    return BlocksConfig(length=ratio, overlap=True, index=index)
