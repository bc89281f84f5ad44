"""Hyper-parameters of attention over a window of positions and compressed blocks of all earlier ones (DeepSeek V4).

Letters beside those of `engine.model.config`: R rank of queries, G groups of heads, B positions of a block.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockIndexConfig:
    """Which blocks a query attends to: the best `top_k`, of equal ones the earlier.

    q (heads, width) = q_b of the low-rank query, k (width,) the block's key, made as CompressedConfig says but with
    matrices of the indexer's own; both are rotated. A score is the sum over the heads of w_h · max(0, q_h · k), with
    w = proj · x / sqrt(heads · width).
    """

    heads: int
    width: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class BlocksConfig:
    """Blocks of B positions, each of which becomes one key once it is full.

    A position leaves u = kv · x and g = gate · x + ape[position mod B]. The block's key is, number by number, the sum
    of the u of its positions weighted by the softmax of their g over them, normalized by a weight, then rotated as at
    the block's first position. Where blocks overlap, u and g are twice as wide: the sum is over 2 · B positions, with
    the second half of the numbers of its own and the first half of those of the block before; the first block has its
    own alone.
    """

    length: int  # B
    overlap: bool
    index: BlockIndexConfig | None  # None = a query attends to all full blocks up to its position


@dataclass(frozen=True, kw_only=True)
class CompressedConfig:
    """Attention with one key per position, which is its value too: a query sees a window of these, and blocks.

    1. c = norm(q_a x), (R,); a query head is a head of q_b c, normalized without a weight; the key is norm(kv x). The
    last numbers of both are rotated, as many as RopeConfig.n_rot. 2. Attention over the keys of the window and those
    of the full blocks that end at or before the query's position, chosen by an index or all; sinks. 3. The last numbers
    of what a head gives are rotated back by the query's position. 4. The heads are G groups of consecutive ones;
    group g of them, side by side, is multiplied by output_a_g, and attn_output reads the G · output_rank results.
    AttentionConfig then says what attention sees of single positions: n_kv_heads = 1, key_width = value_width = Hd.
    """

    q_rank: int
    groups: int
    output_rank: int
    blocks: BlocksConfig | None  # None = the layer has its window alone

    def position_width(self, head_width: int) -> int:
        """Numbers cached for a position beside its key: what blocks are made of."""
        if self.blocks is None:
            return 0
        width = head_width + (0 if self.blocks.index is None else self.blocks.index.width)
        return 2 * width * (1 + self.blocks.overlap)

    def block_width(self, head_width: int) -> int:
        """Numbers cached for a full block."""
        if self.blocks is None:
            return 0
        return head_width + (0 if self.blocks.index is None else self.blocks.index.width)
