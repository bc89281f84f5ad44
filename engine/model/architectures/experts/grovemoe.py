"""GroveMoE: groups of experts share a smaller one."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import HEAD_NORM
from engine.model.config import RopeStyle
from engine.model.parts import MoeParts, RopeParts

ARCHITECTURES = (
    Architecture(
        name="grovemoe",
        rope=RopeParts(RopeStyle.NEOX),
        attention=HEAD_NORM,
        moe=MoeParts(required=True, groups=True, width_of_used=True, adjugates=True),
    ),
)
