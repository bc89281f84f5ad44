"""Weights of the indexer of a layer's attention."""

from __future__ import annotations

from engine.model.building.positions import PositionTables
from engine.model.building.source import TensorSource
from engine.model.config import AttentionConfig, IndexerKind, NormKind
from engine.model.parts import Presence
from engine.model.weights import IndexerWeights


def build_indexer(
    source: TensorSource, positions: PositionTables, prefix: str, attention: AttentionConfig
) -> IndexerWeights | None:
    """The indexer of the layer whose tensors' names begin with `prefix`; None where it takes another layer's choice."""
    indexer, width = attention.indexer, source.width
    assert indexer is not None
    if indexer.shared:
        # Some files keep tensors of an indexer in these layers too.
        source.tensors.ignore((f"{prefix}.indexer.*", f"{prefix}.indexer_compressor_*"))
        return None
    name, rows = f"{prefix}.indexer", indexer.heads * indexer.width
    gated = indexer.kind is IndexerKind.GATED_POOLS
    if not gated and indexer.kind is not IndexerKind.TOKENS:
        return IndexerWeights(
            q=source.linear(f"{name}.q_proj", rows, width),
            k=source.linear(f"{name}.k_proj", indexer.width, width),
            k_norm=source.norm(f"{name}.k_norm", (indexer.width,)),
            q_norm=source.norm(f"{name}.q_norm", (indexer.width,)),
            proj=None,
            rope=positions.rope(indexer.rope),
        )
    latent, parts = attention.latent, source.architecture.attention
    assert latent is not None
    assert latent.q_rank is not None
    assert parts is not None
    assert parts.indexer is not None
    epsilon = source.config.norm_epsilon if parts.indexer.epsilon is None else parts.indexer.epsilon
    epsilon = indexer.key_epsilon if gated else epsilon
    pooled = f"{prefix}.indexer_compressor"
    k_norm = source.tensors.norm(
        f"{name}.k_norm", (indexer.width,), NormKind.LAYER, epsilon, weight=True, bias=Presence.ALWAYS
    )
    return IndexerWeights(
        q=source.linear(f"{name}.attn_q_b", rows, latent.q_rank),
        k=source.linear(f"{name}.attn_k", indexer.width, width),
        k_norm=k_norm,
        q_norm=None,
        proj=source.linear(f"{name}.proj", indexer.heads, width),
        rope=positions.rope(indexer.rope),
        gate=source.linear(f"{pooled}_gate", indexer.width, width) if gated else None,
        ape=source.tensors.vector(f"{pooled}_ape.weight", (indexer.block, indexer.width)) if gated else None,
    )
