"""OLMo 1 to 3 and OLMoE."""

from engine.model.architecture import Architecture
from engine.model.config import NormKind, QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    LayerParts,
    MoeParts,
    NormParts,
    QkNormParts,
    RopeParts,
    WindowParts,
)

ARCHITECTURES = (
    Architecture(
        name="olmo",
        norm=NormParts(NormKind.LAYER, weight=False),
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(clamp=True),
    ),
    Architecture(
        name="olmo2",
        layer=LayerParts(
            attn_norm=(),
            ffn_norm=(),
            attn_post_norm=("post_attention_norm",),
            ffn_post_norm=("post_ffw_norm",),
        ),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.WIDTH), window=WindowParts(period=4, unscaled=True)),
    ),
    Architecture(
        name="olmoe",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.WIDTH)),
        moe=MoeParts(required=True, normalize=False, weight_scale=True),
    ),
)
