"""MiniMax M2 (normalized queries and keys of all heads together) and M3 (an indexer of blocks)."""

from engine.model.architecture import Architecture
from engine.model.config import Activation, QkNorm, RopeStyle, Routing
from engine.model.indexer_config import IndexerKind
from engine.model.parts import AttentionParts, FfnParts, IndexerParts, MoeParts, QkNormParts, RopeParts

ARCHITECTURES = (
    Architecture(
        name="minimax-m2",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.WIDTH)),
        moe=MoeParts(required=True, routing=Routing.SIGMOID, weight_scale=True, groups=True, selection_bias=True),
    ),
    Architecture(
        name="minimax-m3",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD), indexer=IndexerParts(IndexerKind.BLOCKS)),
        ffn=FfnParts(Activation.SWIGLU_CLAMPED),
        moe=MoeParts(
            required=True,
            routing=Routing.SIGMOID,
            normalize=None,
            weight_scale=True,
            dense_lead=True,
            groups=True,
            shared=True,
            shared_counted=True,
            selection_bias=True,
        ),
    ),
)
