"""Llama 1-3, Mistral 7B, Mixtral and the many families called "llama"; Nemotron Super and Ultra; llama-embed."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.parts import AttentionParts, FfnParts, HeadParts, LayerParts, MoeParts, RopeParts, WindowParts

ARCHITECTURES = (
    *(
        Architecture(
            name=name,
            rope=RopeParts(RopeStyle.NORM, divisors=True),
            attention=AttentionParts(window=WindowParts(period=0)),
            ffn=FfnParts(scales=True),
            moe=MoeParts(normalize=True, weight_scale=True),
            head=HeadParts(generates=generates),
        )
        for name, generates in (("llama", True), ("llama-embed", False))
    ),
    # Llama with parts taken out; layers whose attention is one matrix (Nemotron 51B) are refused.
    Architecture(
        name="deci",
        layer=LayerParts(without_heads=True),
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        attention=AttentionParts(scale=True),
    ),
)
