"""Command R and Command A: one LayerNorm without bias for attention and feed-forward side by side."""

from engine.model.architecture import Architecture
from engine.model.config import NormKind, QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    FfnParts,
    HeadParts,
    LayerParts,
    LogitScale,
    NormParts,
    Parallel,
    Presence,
    QkNormParts,
    RopeParts,
    WindowParts,
)

_SIDE_BY_SIDE = LayerParts(ffn_norm=("attn_norm",), parallel=Parallel.ALWAYS)

ARCHITECTURES = (
    Architecture(
        name="command-r",
        norm=NormParts(NormKind.LAYER),
        layer=_SIDE_BY_SIDE,
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.EACH_HEAD, presence=Presence.OPTIONAL)),
        head=HeadParts(scale=LogitScale.MULTIPLIES),
    ),
    Architecture(
        name="cohere2",
        norm=NormParts(NormKind.LAYER),
        layer=_SIDE_BY_SIDE,
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(window=WindowParts(period=4, rotated_only=True)),
        ffn=FfnParts(scales=True),
        head=HeadParts(scale=LogitScale.MULTIPLIES),
    ),
)
