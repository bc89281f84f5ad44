"""SmallThinker: a router that reads the layer's input, so that experts can be fetched while attention runs."""

from engine.model.architecture import Architecture
from engine.model.config import Activation, RopeStyle, Routing
from engine.model.parts import AttentionParts, FfnParts, MoeParts, RopeParts, WindowParts

ARCHITECTURES = (
    Architecture(
        name="smallthinker",
        rope=RopeParts(RopeStyle.NEOX, skip_every=4, skip_first=True),
        attention=AttentionParts(window=WindowParts(period=4, full_first=True)),
        ffn=FfnParts(Activation.RELU),
        moe=MoeParts(required=True, routing=Routing.SIGMOID, groups=True, routed_early=True),
    ),
)
