"""Mellum and Maple: windows in most layers, and experts chosen by softmax."""

from engine.model.architecture import Architecture
from engine.model.config import QkNorm, RopeStyle
from engine.model.parts import AttentionParts, FfnParts, MoeParts, QkNormParts, RopeParts, WindowParts

_HEAD_NORM = QkNormParts(QkNorm.HEAD)

ARCHITECTURES = (
    Architecture(
        name="mellum",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=_HEAD_NORM, window=WindowParts(period=4, unscaled=True)),
        ffn=FfnParts(scales=True),
        moe=MoeParts(required=True, groups=True, width_of_used=True),
    ),
    Architecture(
        name="maple",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=_HEAD_NORM, window=WindowParts(rotated_only=True, own_width=True)),
        ffn=FfnParts(limits=True, limits_gate=True),
        moe=MoeParts(required=True, groups=True),
    ),
)
