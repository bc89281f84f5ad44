"""MiniMax-01 (lightning attention), M2 (queries and keys normalized over all heads) and M3 (an indexer of blocks)."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import SHARED_EXPERTS_BY_SIGMOID
from engine.model.config import Activation, IndexerKind, QkNorm, RopeStyle, Routing, SkipKind
from engine.model.parts import (
    AttentionParts,
    FfnParts,
    IndexerParts,
    LayerParts,
    MoeParts,
    Placement,
    QkNormParts,
    Recurrence,
    RecurrentParts,
    RopeParts,
)

ARCHITECTURES = (
    Architecture(
        name="minimax-01",
        layer=LayerParts(skip=SkipKind.NORMED_SKIP),
        rope=RopeParts(RopeStyle.NEOX),
        recurrent=RecurrentParts(Recurrence.LIGHTNING, Placement.LISTED, interval=8),
        moe=MoeParts(required=True, weight_scale=True, groups=True),
        unused_scales=("attn_qkv",),
    ),
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
        moe=SHARED_EXPERTS_BY_SIGMOID,
    ),
)
