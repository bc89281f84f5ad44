"""Falcon 7B and 40B: attention and feed-forward side by side, in larger models each with a norm of its own."""

from dataclasses import replace

from engine.model.architecture import Architecture
from engine.model.architectures.common import LAYER_NORM, SIDE_BY_SIDE
from engine.model.config import Activation, RopeStyle
from engine.model.parts import FfnParts, RopeParts

ARCHITECTURES = (
    Architecture(
        name="falcon",
        norm=LAYER_NORM,
        layer=replace(SIDE_BY_SIDE, attn_norm=("attn_norm_2", "attn_norm")),
        rope=RopeParts(RopeStyle.NEOX),
        ffn=FfnParts(Activation.GELU, gated=False),
    ),
)
