"""Granite 3 and MiniCPM: Llama with multipliers on embeddings, residuals, attention scores and logits."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.parts import (
    AttentionParts,
    EmbeddingParts,
    FfnParts,
    HeadParts,
    LayerParts,
    LogitScale,
    MoeParts,
    Presence,
    RopeParts,
    WindowParts,
)

_MOE = MoeParts(normalize=True, weight_scale=True, shared=True)

ARCHITECTURES = (
    *(
        Architecture(
            name=name,
            embedding=EmbeddingParts(scale=0.0),
            layer=LayerParts(residual_scale=0.0),
            rope=RopeParts(RopeStyle.NORM, switch=True, long_factors=True, divisors=True),
            attention=AttentionParts(scale=True),
            moe=_MOE,
            head=HeadParts(scale=LogitScale.DIVIDES),
        )
        for name in ("granite", "granitemoe")
    ),
    Architecture(
        name="granite_swa",
        embedding=EmbeddingParts(scale=0.0),
        layer=LayerParts(residual_scale=0.0),
        rope=RopeParts(RopeStyle.NORM, pattern=True, long_factors=True, divisors=True),
        attention=AttentionParts(window=WindowParts(period=0), scale=True, sinks=True),
        ffn=FfnParts(fused_gate=Presence.OPTIONAL),
        moe=_MOE,
        head=HeadParts(scale=LogitScale.DIVIDES),
    ),
    Architecture(
        name="minicpm",
        embedding=EmbeddingParts(scale=12.0),
        layer=LayerParts(residual_scale=1.4),
        rope=RopeParts(RopeStyle.NORM, long_factors=True, divisors=True),
        attention=AttentionParts(scale=True),
        moe=_MOE,
        head=HeadParts(scale=LogitScale.DIVIDES, scale_width=256),
    ),
)
