"""GroveMoE: groups of experts share a smaller one."""

from engine.model.architecture import Architecture
from engine.model.config import QkNorm, RopeStyle
from engine.model.parts import AttentionParts, MoeParts, QkNormParts, RopeParts

ARCHITECTURES = (
    Architecture(
        name="grovemoe",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD)),
        moe=MoeParts(required=True, groups=True, width_of_used=True, adjugates=True),
    ),
)
