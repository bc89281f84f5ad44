"""EXAONE 3, 4 (norms after the parts) and MoE; large models rotate in their windowed layers only."""

from engine.model.architecture import Architecture
from engine.model.config import QkNorm, RopeStyle
from engine.model.parts import AttentionParts, LayerParts, MoeParts, QkNormParts, RopeParts, WindowParts

ARCHITECTURES = (
    Architecture(name="exaone", rope=RopeParts(RopeStyle.NEOX, divisors=True)),
    Architecture(
        name="exaone4",
        layer=LayerParts(
            attn_norm=(),
            ffn_norm=(),
            attn_post_norm=("post_attention_norm",),
            ffn_post_norm=("post_ffw_norm",),
        ),
        rope=RopeParts(RopeStyle.NEOX, divisors=True),
        attention=AttentionParts(
            qk_norm=QkNormParts(QkNorm.HEAD),
            window=WindowParts(period=4, default=4096, rotated_only=True, n_layers=64),
        ),
    ),
    Architecture(
        name="exaone-moe",
        rope=RopeParts(RopeStyle.NEOX, divisors=True),
        attention=AttentionParts(
            qk_norm=QkNormParts(QkNorm.HEAD),
            window=WindowParts(period=4, rotated_only=True),
        ),
        moe=MoeParts(
            required=True,
            normalize=None,
            weight_scale=True,
            dense_lead=True,
            groups=True,
            shared=True,
            shared_counted=True,
            selection_bias=True,
        ),
        next_token_layers=True,
    ),
)
