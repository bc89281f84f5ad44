"""Command R and Command A: one norm without bias for attention and feed-forward side by side."""

from dataclasses import replace

from engine.model.architecture import Architecture
from engine.model.architectures.common import SHARED_EXPERTS_BY_SIGMOID, SIDE_BY_SIDE
from engine.model.config import NormKind, QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    FfnParts,
    HeadParts,
    LogitScale,
    NormParts,
    Presence,
    QkNormParts,
    RopeParts,
    WindowParts,
)

ARCHITECTURES = (
    Architecture(
        name="command-r",
        norm=NormParts(NormKind.LAYER),
        layer=SIDE_BY_SIDE,
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.EACH_HEAD, presence=Presence.OPTIONAL)),
        head=HeadParts(scale=LogitScale.MULTIPLIES),
    ),
    Architecture(
        name="cohere2",
        norm=NormParts(NormKind.LAYER),
        layer=SIDE_BY_SIDE,
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(window=WindowParts(period=4, rotated_only=True)),
        ffn=FfnParts(scales=True),
        head=HeadParts(scale=LogitScale.MULTIPLIES),
    ),
    # The sum of the chosen experts and the shared one is halved.
    Architecture(
        name="cohere2moe",
        norm=NormParts(NormKind.LAYER, either_kind=True),
        layer=SIDE_BY_SIDE,
        rope=RopeParts(RopeStyle.NORM, dense_lead=True),
        attention=AttentionParts(window=WindowParts(period=4, full_first=True, rotated_only=True)),
        ffn=FfnParts(scales=True),
        moe=replace(SHARED_EXPERTS_BY_SIGMOID, shared_factor=0.5, selection_bias=False),
        head=HeadParts(scale=LogitScale.MULTIPLIES),
        next_token_layers=True,
    ),
)
