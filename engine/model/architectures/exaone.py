"""EXAONE 3, and 4: norms behind the parts; the large model rotates in its windowed layers only."""

from engine.model.architecture import Architecture, WindowParts
from engine.model.config import QkNorm, RopeStyle

ARCHITECTURES = (
    Architecture(name="exaone", rope=RopeStyle.NEOX, rope_freqs=True),
    Architecture(
        name="exaone4",
        rope=RopeStyle.NEOX,
        rope_freqs=True,
        attn_norm=(),
        ffn_norm=(),
        attn_post_norm=("post_attention_norm",),
        ffn_post_norm=("post_ffw_norm",),
        qk_norm=QkNorm.HEAD,
        window=WindowParts(period=4, default=4096, rotated_only=True, n_layers=64),
    ),
)
