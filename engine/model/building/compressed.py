"""Weights of attention over a window and compressed blocks."""

from __future__ import annotations

from engine.model.building.source import TensorSource
from engine.model.config import AttentionConfig, BlocksConfig, CompressedConfig, NormKind
from engine.model.weights import BlockIndexWeights, BlockKeyWeights, CompressedWeights, Norm


def build_compressed(
    source: TensorSource, prefix: str, attention: AttentionConfig, config: CompressedConfig
) -> CompressedWeights:
    """Of the layer whose tensors' names begin with `prefix`, without attn_output_b."""
    width, head = source.width, attention.key_width
    rows = attention.n_heads * head
    output_a = source.linear(f"{prefix}.attn_output_a", config.groups * config.output_rank, rows // config.groups)
    starts = range(0, config.groups * config.output_rank, config.output_rank)
    blocks = config.blocks
    keys = None if blocks is None else _keys(source, f"{prefix}.attn_compressor", blocks, head)
    return CompressedWeights(
        q_a=source.linear(f"{prefix}.attn_q_a", config.q_rank, width),
        q_a_norm=source.norm(f"{prefix}.attn_q_a_norm", (config.q_rank,)),
        q_b=source.linear(f"{prefix}.attn_q_b", rows, config.q_rank),
        q_norm=Norm(NormKind.RMS, source.config.norm_epsilon, None),
        kv=source.linear(f"{prefix}.attn_kv", head, width),
        kv_norm=source.norm(f"{prefix}.attn_kv_a_norm", (head,)),
        output_a=tuple(output_a.slice_rows(start, start + config.output_rank) for start in starts),
        keys=keys,
        index=None if blocks is None else _index(source, prefix, config.q_rank, blocks),
    )


def _index(source: TensorSource, prefix: str, q_rank: int, blocks: BlocksConfig) -> BlockIndexWeights | None:
    index = blocks.index
    if index is None:
        return None
    return BlockIndexWeights(
        q_b=source.linear(f"{prefix}.indexer.attn_q_b", index.heads * index.width, q_rank),
        proj=source.linear(f"{prefix}.indexer.proj", index.heads, source.width),
        keys=_keys(source, f"{prefix}.indexer_compressor", blocks, index.width),
    )


def _keys(source: TensorSource, name: str, blocks: BlocksConfig, width: int) -> BlockKeyWeights:
    """What makes keys of `width` numbers."""
    rows = width * (1 + blocks.overlap)
    return BlockKeyWeights(
        kv=source.linear(f"{name}_kv", rows, source.width),
        gate=source.linear(f"{name}_gate", rows, source.width),
        ape=source.tensors.vector(f"{name}_ape.weight", (blocks.length, rows)),
        norm=source.norm(f"{name}_norm", (width,)),
    )
