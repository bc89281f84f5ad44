"""ERNIE 4.5: experts in some layers; the small models are dense."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.parts import BiasParts, MoeParts, RopeParts

ARCHITECTURES = (
    Architecture(
        name="ernie4_5",
        rope=RopeParts(RopeStyle.NORM, sections=RopeStyle.NORM),
        biases=BiasParts(unused=("attn_output",)),
    ),
    Architecture(
        name="ernie4_5-moe",
        rope=RopeParts(RopeStyle.NORM, sections=RopeStyle.NORM),
        moe=MoeParts(required=True, dense_lead=True, interleaved=True, shared=True, selection_bias=True),
        biases=BiasParts(unused=("attn_output",)),
    ),
)
