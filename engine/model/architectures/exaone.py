"""EXAONE 3, and 4: norms after the parts; the large model rotates in its windowed layers only."""

from engine.model.architecture import Architecture
from engine.model.config import QkNorm, RopeStyle
from engine.model.parts import AttentionParts, LayerParts, QkNormParts, RopeParts, WindowParts

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
)
