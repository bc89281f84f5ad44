"""Attention over a window and compressed blocks in the plan; formulas: engine/model/config/compressed.py.

Letters: H heads, Hd their width, R rank of queries, G groups of heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config import KvType
from engine.cuda.attention.cache import BlockCacheShape
from engine.cuda.compressed.plan import BlockShape, block_shape
from engine.cuda.indexer.plan import FEW_ROWS, scored_rows
from engine.cuda.launch_plan.products import Chooser, Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Brick, Launch, Norm, Step
from engine.model.config import AttentionConfig
from engine.model.weights import AttentionWeights


@dataclass(frozen=True)
class CompressedPlan:
    """One layer.

    Attributes:
        shape: the kernels. q_rank: R. group_width: what a group's heads give. group_rank: what is made of it.
        inputs: products of norm(x): the low-rank query, the key, what blocks are made of, the weights of the index.
        q_b: queries of the heads. index_q: those of the index, or None.
        output_a: a product for each group. output: the output projection.
    """

    shape: BlockShape
    q_rank: int
    group_width: int
    group_rank: int
    inputs: Projection
    q_b: Projection
    index_q: Projection | None
    output_a: tuple[Projection, ...]
    output: Projection

    @property
    def takes_operand(self) -> bool:
        """Whether the first products read an operand that an earlier layer has left."""
        return False

    @property
    def cache_shape(self) -> BlockCacheShape:
        """What the layer caches."""
        return self.shape.cache

    def products(self) -> Iterator[Product]:
        """All products."""
        inner = () if self.index_q is None else (self.index_q,)
        for projection in (self.inputs, self.q_b, *inner, *self.output_a, self.output):
            yield from projection.parts

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        yield from (matrix for product in self.products() for matrix in product.matrices)

    def widths(self) -> dict[str, int]:
        """What it needs of the activations, by the fields of Widths."""
        heads = self.shape.attention
        found = {"qkv": heads.row_width, "attention": heads.heads * heads.value_dim, "inputs": self.inputs.width}
        found["heads"] = len(self.output_a) * self.group_rank
        return found | {"index_queries": 0 if self.index_q is None else self.index_q.width}

    # ---- launches --------------------------------------------------------------------------------------------

    def bricks(self, step: Step, norm: Norm, *, ready: bool) -> Iterator[Brick]:
        """See AttentionPlan.bricks."""
        yield Brick("attn_qkv", self._queries(step, norm))
        yield Brick("attention", self._attention(step))
        yield Brick("attn_output", self._result(step), added=True)

    def _queries(self, step: Step, norm: Norm) -> Iterator[Launch]:
        yield from step.norm(norm)
        yield from step.product(self.inputs)
        yield step.part("normalize_pieces")
        yield from step.product(self.q_b)
        for kernel in ("normalize_pieces", "normalize_pieces", "rotate_pieces"):
            yield step.part(kernel)
        if self.index_q is not None:
            yield from step.product(self.index_q)
            yield step.part("rotate_pieces")

    def _attention(self, step: Step) -> Iterator[Launch]:
        shape, index = self.shape, self.shape.index
        yield Launch("block_append", shape.append_job())
        if shape.length:
            yield Launch("block_keys", shape.keys_job())
        if index is not None:
            for _ in range(0, step.n_rows, scored_rows(step.most_rows)):
                yield Launch("index_scores", index.scores_job())
                yield Launch("index_choose", index.choose_job())
        attend, merge = shape.attention_jobs()
        yield Launch("attention_chosen", attend)
        if step.n_rows <= FEW_ROWS:
            yield Launch("merge_chosen", merge)

    def _result(self, step: Step) -> Iterator[Launch]:
        yield step.part("rotate_pieces")
        for projection in self.output_a:
            yield from step.product(projection)
        yield from step.product(self.output)


def describe_compressed(
    config: AttentionConfig, weights: AttentionWeights, chooser: Chooser, *, kv_type: KvType, factor: float
) -> CompressedPlan:
    """Attention of one layer; what it adds to the stream is multiplied by factor."""
    assert config.compressed is not None
    assert weights.compressed is not None
    own, index = weights.compressed, weights.compressed.index
    inputs = [own.q_a, own.kv]
    inputs += [] if own.keys is None else [own.keys.kv, own.keys.gate]
    inputs += [] if index is None else [index.keys.kv, index.keys.gate, index.proj]
    return CompressedPlan(
        shape=block_shape(config, kv_type),
        q_rank=config.compressed.q_rank,
        group_width=config.n_heads // config.compressed.groups * config.value_width,
        group_rank=config.compressed.output_rank,
        inputs=chooser.side_by_side(inputs),
        q_b=chooser.projection([own.q_b]),
        index_q=None if index is None else chooser.projection([index.q_b]),
        output_a=tuple(chooser.projection([one]) for one in own.output_a),
        output=chooser.projection([weights.output], factor=factor),
    )
