"""Mistral 3 and Ministral 3: Llama with YaRN and queries sharpened beyond the original context."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.parts import AttentionParts, FfnParts, MoeParts, RopeParts, TemperatureParts, WindowParts

ARCHITECTURES = (
    Architecture(
        name="mistral3",
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        attention=AttentionParts(window=WindowParts(period=0), temperature=TemperatureParts()),
        ffn=FfnParts(scales=True),
        moe=MoeParts(normalize=True, weight_scale=True),
    ),
)
