"""What an architecture file declares: a model family as a list of its parts. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.model.parts import (
    AttentionParts,
    BiasParts,
    EmbeddingParts,
    FfnParts,
    HeadParts,
    LayerParts,
    MoeParts,
    NormParts,
    RankParts,
    RecurrentParts,
    RopeParts,
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model family: its parts in the order in which a token passes through them.

    Attributes:
        name: value of general.architecture, also the prefix of its metadata keys.
        embedding: from token ids to vectors.
        norm: all norms.
        layer: norms of a layer and order of its parts.
        rope: rotation of queries and keys; None = nothing is rotated.
        attention: mixer of layers with attention; None = no layer has attention.
        recurrent: mixer of recurrent layers; None = no layer is recurrent.
        ffn: feed-forward parts; None = layers have none.
        moe: mixture of experts; None = the family has no form with experts.
        head: from the last hidden state to logits.
        rank: the classification head of rerankers; None = the family has none.
        dense: dense_2 and dense_3, where a file has them, are applied to embeddings.
        biases: biases of projections.
        unused_scales: projections, by the last part of the tensor's name, whose scale takes no part.
        next_token_layers: the last nextn_predict_layers layers predict later tokens and take no part.
        ignored_keys: metadata that such files hold and that changes nothing here.
        ignored_tensors: names of tensors such files may hold that take no part in next-token logits ("blk.*.x" = of
            any layer).
    """

    name: str
    rope: RopeParts | None
    embedding: EmbeddingParts = field(default_factory=EmbeddingParts)
    norm: NormParts = field(default_factory=NormParts)
    layer: LayerParts = field(default_factory=LayerParts)
    attention: AttentionParts | None = field(default_factory=AttentionParts)
    recurrent: RecurrentParts | None = None
    ffn: FfnParts | None = field(default_factory=FfnParts)
    moe: MoeParts | None = None
    head: HeadParts = field(default_factory=HeadParts)
    rank: RankParts | None = None
    dense: bool = False
    biases: BiasParts = field(default_factory=BiasParts)
    unused_scales: tuple[str, ...] = ()
    next_token_layers: bool = False
    ignored_keys: tuple[str, ...] = ()
    ignored_tensors: tuple[str, ...] = ()
