"""Gemma 1, 2 and 3: token vectors scaled by sqrt(D), later with norms on both sides of every part, caps and windows."""

from engine.model.architecture import Architecture
from engine.model.config import Activation, QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    EmbeddingParts,
    FfnParts,
    HeadParts,
    LayerParts,
    NormParts,
    QkNormParts,
    RopeParts,
    WindowParts,
)

_NORMS_ON_BOTH_SIDES = LayerParts(attn_post_norm=("post_attention_norm",), ffn_post_norm=("post_ffw_norm",))

ARCHITECTURES = (
    Architecture(
        name="gemma",
        embedding=EmbeddingParts(sqrt_width=True),
        rope=RopeParts(RopeStyle.NEOX),
        ffn=FfnParts(Activation.GELU),
    ),
    Architecture(
        name="gemma2",
        embedding=EmbeddingParts(sqrt_width=True),
        layer=_NORMS_ON_BOTH_SIDES,
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(
            window=WindowParts(period=2, default=4096),
            softcap=50.0,
            scale=True,
            scale_by_width=frozenset({46}),  # the 27B model
        ),
        ffn=FfnParts(Activation.GELU),
        head=HeadParts(softcap=30.0),
    ),
    # Files of Ollama's converter leave out the base and the epsilon, which all models have in common.
    Architecture(
        name="gemma3",
        embedding=EmbeddingParts(sqrt_width=True),
        norm=NormParts(epsilon=1e-6),
        layer=_NORMS_ON_BOTH_SIDES,
        rope=RopeParts(RopeStyle.NEOX, base=1000000.0),
        attention=AttentionParts(
            qk_norm=QkNormParts(QkNorm.HEAD),
            window=WindowParts(period=6, base=10000.0, unscaled=True),
            scale=True,
            scale_by_width=frozenset({62}),  # the 27B model
        ),
        ffn=FfnParts(Activation.GELU),
        head=HeadParts(softcap=0.0),
    ),
)
