"""The indexer of a layer's attention, from metadata."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import ModelFileError, UnsupportedModelError
from engine.model.config import IndexerConfig, IndexerKind, RopeConfig
from engine.model.parts import IndexerParts
from engine.model.reading.source import Source

OWN_FIRST, OWN_PERIOD = 2, 4
"""Layers up to this number have an indexer of their own, then each of so many: see IndexerParts.shared_context."""

LONGEST_BLOCK = 4096
"""Most positions of a block."""


def read_indexer(
    source: Source, parts: IndexerParts, index: int, kv_heads: int, rope: RopeConfig | None
) -> IndexerConfig | None:
    """The indexer of layer `index`; None where it has none.

    Args:
        source: the file.
        parts: the declaration.
        index: number of the layer.
        kv_heads: key/value heads of the layer.
        rope: rotation of its queries and keys.

    Raises:
        ModelFileError: a key is missing or has an impossible value, or sizes contradict each other.
    """
    read, block, local = source.read, 1, 0
    if parts.optional and read.integer("attention.indexer.top_k", 0, low=0) == 0:
        return None
    if parts.kind is IndexerKind.BLOCKS:
        if index < read.integer("leading_dense_block_count", 0, low=0):
            return None
        block = read.integer("attention.indexer.block_size", high=LONGEST_BLOCK)
        local = read.integer("attention.indexer.local_blocks", 0, low=0)
    if parts.kind is IndexerKind.POOLED:
        block = _ratio(source, index)
        if block == 0:
            return None
    gated = parts.kind is IndexerKind.GATED_POOLS
    if gated:
        block = _pool(source)
    if (gated or parts.kind is IndexerKind.TOKENS) and f"blk.{index}.attn_q_a.weight" not in source.tensors:
        raise ModelFileError(f"tensor blk.{index}.attn_q_a.weight is missing; the indexer reads the queries it makes")
    heads = read.integer("attention.indexer.head_count")
    top_k = read.integer("attention.indexer.top_k")
    if parts.kind is IndexerKind.BLOCKS and heads != kv_heads:
        raise ModelFileError(
            f"attention.indexer.head_count is {heads} and layer {index} has {kv_heads} key/value heads; they must be "
            "equal: each of these heads has an indexer of its own"
        )
    if (gated or parts.kind is IndexerKind.POOLED) and top_k < block:
        key = "attention.indexer.kpool" if gated else f"attention.compress_ratios of layer {index}"
        raise ModelFileError(
            f"attention.indexer.top_k is {top_k} and {key} is {block}; the first must be at least the second, the "
            "length of a block"
        )
    return IndexerConfig(
        kind=parts.kind,
        heads=heads,
        width=_width(source, rope),
        top_k=top_k,
        rope=rope if rope is None or parts.style is None else replace(rope, style=parts.style),
        block=block,
        local=local,
        shared=parts.shared and _is_shared(source, parts, index),
        rotated_last=parts.rotated_last,
        key_epsilon=read.number("attention.layer_norm_epsilon", 0.0, low=0.0, high=1.0) if gated else 0.0,
    )


def _pool(source: Source) -> int:
    """Positions of a block whose keys are weighted by gates."""
    read, tail = source.read, "attention.indexer.kpool_select_tail"
    if not read.flag(tail, True):
        raise UnsupportedModelError(
            f"{source.name}.{tail} is false; supported is true: positions behind the last full block are read"
        )
    return read.integer("attention.indexer.kpool", low=2, high=LONGEST_BLOCK)


def _width(source: Source, rope: RopeConfig | None) -> int:
    """Width of a head, whose first elements are rotated as many as in attention."""
    rotated = 0 if rope is None else rope.n_rot
    return source.read.integer("attention.indexer.key_length", low=max(1, rotated))


def _ratio(source: Source, index: int) -> int:
    """Positions of a block in layer `index`; 0 = it has no indexer."""
    key = "attention.compress_ratios"
    if not source.read.has(key):
        return 0
    return source.read.per_layer(key, source.n_blocks, low=0, high=LONGEST_BLOCK)[index]


def _is_shared(source: Source, parts: IndexerParts, index: int) -> bool:
    """Whether layer `index` takes what another layer chose."""
    key = "attention.indexer.types"
    if not source.read.has(key):
        long = parts.shared_context is not None and source.context_length >= parts.shared_context
        return long and index > OWN_FIRST and index % OWN_PERIOD != OWN_FIRST
    own = source.read.per_layer(key, source.n_layers, low=0, high=1)
    if not any(own[: index + 1]):
        raise ModelFileError(
            f"{source.name}.{key} gives layer {index} no indexer; allowed is 1, as none comes before it"
        )
    return not own[index]
