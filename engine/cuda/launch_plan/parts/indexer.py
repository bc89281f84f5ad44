"""The indexer of a layer's attention in the plan: its products, its choice, and attention over what is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config import KvType
from engine.cuda.attention.attention_shape import AttentionShape
from engine.cuda.indexer.plan import FEW_ROWS, IndexerShape, Pool, head_tile, indexer_shape, scored_rows
from engine.cuda.launch_plan.products import Chooser, Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Launch, Step
from engine.model.config import IndexerConfig
from engine.model.weights import IndexerWeights


@dataclass(frozen=True)
class OwnIndexer:
    """What scores are made of; see engine.model.config.IndexerKind.

    Attributes:
        inputs: products of norm(x): keys, gates if there are any, then the heads' weights; without such weights
            queries, then keys.
        queries: queries from the low-rank query of latent attention; None where `inputs` gives them.
        q_norm: whether queries are normalized. rotates: whether queries and keys are rotated.
        raw_keys: keys are cached as they are.
    """

    inputs: Projection
    queries: Projection | None
    q_norm: bool
    rotates: bool
    raw_keys: bool = False

    def projections(self) -> Iterator[Projection]:
        """All of them."""
        yield self.inputs
        if self.queries is not None:
            yield self.queries

    def launches(self, step: Step) -> Iterator[Launch]:
        """Queries, weights and keys."""
        for projection in self.projections():
            yield from step.product(projection)
        kernels = [(self.q_norm, "normalize_pieces"), (not self.raw_keys, "normalize_pieces")]
        kernels += [(self.rotates, "rotate_pieces"), (self.rotates and not self.raw_keys, "rotate_pieces")]
        yield from (step.part(kernel) for wanted, kernel in kernels if wanted)


@dataclass(frozen=True)
class IndexerPlan:
    """The indexer of one layer.

    Attributes:
        shape: what its kernels are built for. attention: the heads that read what is chosen.
        own: None: the layer takes what the last layer with an indexer of its own has chosen.
    """

    shape: IndexerShape
    attention: AttentionShape
    own: OwnIndexer | None

    @property
    def cached_width(self) -> int:
        """Numbers that the layer caches of a position for its indexer."""
        return 0 if self.own is None else self.shape.cached_width

    def products(self) -> Iterator[Product]:
        """All products."""
        if self.own is not None:
            yield from (part for projection in self.own.projections() for part in projection.parts)

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        yield from (matrix for product in self.products() for matrix in product.matrices)

    def widths(self) -> dict[str, int]:
        """What it needs of the activations, by the fields of Widths."""
        if self.own is None:
            return {}
        queries = 0 if self.own.queries is None else self.own.queries.width
        return {"index_inputs": self.own.inputs.width, "index_queries": queries}

    def choice(self, step: Step) -> Iterator[Launch]:
        """Keys into the cache, scores and choices."""
        if self.own is None:
            return
        yield Launch("index_append", self.shape.append_job())
        for _ in range(0, step.n_rows, scored_rows(step.most_rows)):
            yield Launch("index_scores", self.shape.scores_job())
            yield Launch("index_choose", self.shape.choose_job())

    def attended(self, step: Step) -> Iterator[Launch]:
        """Attention of the rows that choose."""
        tile = head_tile(self.attention)
        yield Launch("attention_chosen", self.shape.attention_job(self.attention, tile))
        if step.n_rows <= FEW_ROWS:
            yield Launch("merge_chosen", self.shape.merge_job(self.attention, tile))


def describe_indexer(
    config: IndexerConfig, weights: IndexerWeights | None, attention: AttentionShape, chooser: Chooser, kv_type: KvType
) -> IndexerPlan:
    """The indexer of one layer; weights: None where it takes another layer's choice."""
    shape = indexer_shape(config, kv_type)
    if weights is None:
        return IndexerPlan(shape, attention, None)
    if weights.proj is not None:
        gate = () if weights.gate is None else (weights.gate,)
        inputs, queries = chooser.side_by_side([weights.k, *gate, weights.proj]), chooser.projection([weights.q])
    else:
        inputs, queries = chooser.side_by_side([weights.q, weights.k]), None
    norms, rotates = weights.q_norm is not None, weights.rope is not None
    raw = shape.pool is Pool.MEAN
    return IndexerPlan(shape, attention, OwnIndexer(inputs, queries, q_norm=norms, rotates=rotates, raw_keys=raw))
