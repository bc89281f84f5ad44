"""OLMo 1 to 3 and OLMoE."""

from dataclasses import replace

from engine.model.architecture import Architecture
from engine.model.architectures.common import NORMS_ON_BOTH_SIDES
from engine.model.config import NormKind, QkNorm, RopeStyle
from engine.model.parts import AttentionParts, MoeParts, NormParts, QkNormParts, RopeParts, WindowParts

ARCHITECTURES = (
    Architecture(
        name="olmo",
        norm=NormParts(NormKind.LAYER, weight=False),
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(clamp=True),
    ),
    Architecture(
        name="olmo2",
        layer=replace(NORMS_ON_BOTH_SIDES, attn_norm=(), ffn_norm=()),
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
