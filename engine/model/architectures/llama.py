"""Llama 1-3, Mistral 7B, Mixtral and the many families whose files are called "llama"; Nemotron Super and Ultra."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.parts import AttentionParts, FfnParts, LayerParts, MoeParts, RopeParts, WindowParts

ARCHITECTURES = (
    Architecture(
        name="llama",
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        attention=AttentionParts(window=WindowParts(period=0)),
        ffn=FfnParts(scales=True),
        moe=MoeParts(normalize=True, weight_scale=True),
    ),
    # Llama with parts taken out; layers whose attention is one matrix (Nemotron 51B) are refused.
    Architecture(
        name="deci",
        layer=LayerParts(without_heads=True),
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        attention=AttentionParts(scale=True),
    ),
)
