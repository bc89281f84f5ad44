"""Llama 1-3, Mistral 7B, Mixtral and the many families whose files call themselves "llama"."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.parts import AttentionParts, FfnParts, MoeParts, RopeParts, WindowParts

ARCHITECTURES = (
    Architecture(
        name="llama",
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        attention=AttentionParts(window=WindowParts(period=0)),
        ffn=FfnParts(scales=True),
        moe=MoeParts(normalize=True, weight_scale=True),
    ),
)
