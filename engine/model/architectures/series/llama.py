"""Llama 1-4, Mistral 7B, Mixtral and the many families called "llama"; llama-embed; Nemotron Super, Nanbeige."""

from engine.model.architecture import Architecture
from engine.model.config import QkNorm, QkWeights, RopeStyle, Routing
from engine.model.parts import (
    AttentionParts,
    FfnParts,
    HeadParts,
    LayerParts,
    MoeParts,
    QkNormParts,
    RopeParts,
    TemperatureParts,
    WindowParts,
)

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
    # The shared expert is as wide as one of the others, which files do not state.
    Architecture(
        name="llama4",
        rope=RopeParts(RopeStyle.NORM, skip_every=4, divisors=True),
        attention=AttentionParts(
            qk_norm=QkNormParts(
                QkNorm.HEAD, after_rope=True, weights=QkWeights.NEITHER, rotated=True, not_of_experts=128
            ),
            window=WindowParts(period=4, default=8192, chunks=True),
            temperature=TemperatureParts(scale=0.1, length=8192, offset=1, unrotated=True),
        ),
        moe=MoeParts(
            routing=Routing.SIGMOID,
            normalize=False,
            interleaved=True,
            shared=True,
            shared_counted=True,
            shared_least=1,
            weights_inputs=True,
        ),
    ),
    # A token passes all layers several times.
    Architecture(
        name="nanbeige",
        layer=LayerParts(loops=True),
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        ffn=FfnParts(scales=True),
    ),
    # Llama with parts taken out; layers whose attention is one matrix (Nemotron 51B) are refused.
    Architecture(
        name="deci",
        layer=LayerParts(without_heads=True),
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        attention=AttentionParts(scale=True),
    ),
)
