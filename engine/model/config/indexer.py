"""Hyper-parameters of an indexer: the small scorer that chooses which positions a query attends to.

Letters beside those of `engine.model.config`: I heads of the indexer, Di width of one. One key (Di,) per position is
cached beside the layer's keys and values. Equal scores: the earlier position, or block, is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.model.config.rope import RopeConfig


class IndexerKind(Enum):
    """How positions are scored. q (I, Di) are the queries of the token at position p, k (Di,) the keys up to p."""

    # q = index_q · (the normalized low-rank query of latent attention), k = layer norm(index_k · x), both rotated;
    # score = Σ_h w_h · max(0, q_h · k) with w = index_proj · x / sqrt(I · Di). The best top_k positions are chosen, for
    # all heads (DeepSeek-V3.2-Exp, 2025).
    TOKENS = "tokens"
    # Each key/value head has a query of its own: I = K. q = norm(index_q · x), k = norm(index_k · x), both rotated; the
    # score of `block` consecutive positions is the largest q · k among those up to p. The last `local` blocks, then
    # the best others are chosen, top_k blocks in all (MiniMax M3).
    BLOCKS = "blocks"
    # k = index_k · x is cached as it is. The key of a full block is the mean of its keys, normalized, then rotated as
    # at the block's first position; q = norm(index_q · x), rotated; score = Σ_h max(0, q_h · k). The best
    # top_k / block of the blocks that end at or before p are chosen, and all positions behind the last of them
    # (Qwen 4 experimental).
    POOLED = "pooled"
    # Queries, keys and weights as of TOKENS, without rotation; g = index_gate · x is cached beside k. The key of a full
    # block is, number by number, the sum of its keys weighted by the softmax over its positions of g + index_ape.
    # Blocks are chosen as POOLED does (GLM 5.3 Flash).
    GATED_POOLS = "gated_pools"


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """Indexer of one layer; see IndexerKind.

    Attributes:
        kind: how positions are scored.
        heads: I.
        width: Di.
        top_k: positions chosen, or blocks (BLOCKS).
        rope: rotation of its queries and keys; None = none.
        rotated_last: the last elements of queries and keys are rotated, not the first.
        key_epsilon: of the layer norm of keys (GATED_POOLS).
        block: positions of a block.
        local: newest blocks that are always chosen.
        shared: the layer has no indexer of its own and takes what the closest layer before it chose.
    """

    kind: IndexerKind
    heads: int
    width: int
    top_k: int
    rope: RopeConfig | None
    block: int = 1
    local: int = 0
    shared: bool = False
    rotated_last: bool = False
    key_epsilon: float = 0.0

    @property
    def all_chosen(self) -> int:
        """With at most so many positions before and at a query all of them are chosen, whatever the scores."""
        if self.kind is IndexerKind.TOKENS:
            return self.top_k
        if self.kind is IndexerKind.BLOCKS:
            return self.top_k * self.block
        return self.top_k // self.block * self.block + self.block - 1

    @property
    def cached_width(self) -> int:
        """Numbers that the cache keeps of a position."""
        if self.shared:
            return 0
        return 2 * self.width if self.kind is IndexerKind.GATED_POOLS else self.width
