"""Command R and Command A: one norm without bias for attention and feed-forward side by side."""

from engine.model.architecture import Architecture
from engine.model.config import NormKind, QkNorm, RopeStyle, Routing
from engine.model.parts import (
    AttentionParts,
    FfnParts,
    HeadParts,
    LayerParts,
    LogitScale,
    MoeParts,
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
    # The sum of the chosen experts and the shared one is halved.
    Architecture(
        name="cohere2moe",
        norm=NormParts(NormKind.LAYER, either_kind=True),
        layer=_SIDE_BY_SIDE,
        rope=RopeParts(RopeStyle.NORM, dense_lead=True),
        attention=AttentionParts(window=WindowParts(period=4, full_first=True, rotated_only=True)),
        ffn=FfnParts(scales=True),
        moe=MoeParts(
            required=True,
            routing=Routing.SIGMOID,
            normalize=None,
            weight_scale=True,
            dense_lead=True,
            groups=True,
            shared=True,
            shared_counted=True,
            shared_factor=0.5,
        ),
        head=HeadParts(scale=LogitScale.MULTIPLIES),
        next_token_layers=True,
    ),
)
