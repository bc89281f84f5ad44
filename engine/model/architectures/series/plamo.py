"""PLaMo 1 (attention and feed-forward side by side), 2 (Mamba in most layers) and 3 (windows)."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import NORMS_ON_BOTH_SIDES, RECURRENT_LAYERS, SIDE_BY_SIDE
from engine.model.config import QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    FfnParts,
    Placement,
    Presence,
    QkNormParts,
    Recurrence,
    RecurrentParts,
    RopeParts,
    WindowParts,
)

ARCHITECTURES = (
    Architecture(
        name="plamo",
        layer=SIDE_BY_SIDE,
        rope=RopeParts(RopeStyle.NEOX),
    ),
    Architecture(
        name="plamo2",
        layer=NORMS_ON_BOTH_SIDES,
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.EACH_HEAD)),
        recurrent=RecurrentParts(Recurrence.PLAMO_2, Placement.WITHOUT_KEYS),
        ffn=FfnParts(fused_gate=Presence.ALWAYS),
        unused_scales=("attn_qkv", "ssm_in", "ssm_x", "ssm_dt", "ssm_out"),
        ignored_keys=RECURRENT_LAYERS,
    ),
    Architecture(
        name="plamo3",
        layer=NORMS_ON_BOTH_SIDES,
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD), window=WindowParts(period=8)),
        ffn=FfnParts(fused_gate=Presence.ALWAYS),
        unused_scales=("attn_qkv",),
    ),
)
