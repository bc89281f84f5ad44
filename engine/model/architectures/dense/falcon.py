"""Falcon 7B and 40B: attention and feed-forward side by side, in larger models each with a norm of its own."""

from engine.model.architecture import Architecture
from engine.model.config import Activation, NormKind, RopeStyle
from engine.model.parts import FfnParts, LayerParts, NormParts, Parallel, Presence, RopeParts

ARCHITECTURES = (
    Architecture(
        name="falcon",
        norm=NormParts(NormKind.LAYER, bias=Presence.ALWAYS),
        layer=LayerParts(
            attn_norm=("attn_norm_2", "attn_norm"),
            ffn_norm=("attn_norm",),
            parallel=Parallel.ALWAYS,
        ),
        rope=RopeParts(RopeStyle.NEOX),
        ffn=FfnParts(Activation.GELU, gated=False),
    ),
)
