"""OLMo 1 to 3 and OLMoE."""

from engine.model.architecture import Architecture, MoeParts, WindowParts
from engine.model.config import NormKind, QkNorm, RopeStyle

ARCHITECTURES = (
    Architecture(name="olmo", rope=RopeStyle.NORM, norm=NormKind.LAYER, norm_weight=False, clamp=True),
    Architecture(
        name="olmo2",
        rope=RopeStyle.NEOX,
        attn_norm=(),
        ffn_norm=(),
        attn_post_norm=("post_attention_norm",),
        ffn_post_norm=("post_ffw_norm",),
        qk_norm=QkNorm.WIDTH,
        window=WindowParts(period=4, unscaled=True),
    ),
    Architecture(
        name="olmoe",
        rope=RopeStyle.NEOX,
        qk_norm=QkNorm.WIDTH,
        moe=MoeParts(required=True, normalize=False, weight_scale=True),
    ),
)
