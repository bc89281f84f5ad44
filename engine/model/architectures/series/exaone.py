"""EXAONE 3, 4 (norms after the parts) and MoE; large models rotate in their windowed layers only."""

from dataclasses import replace

from engine.model.architecture import Architecture
from engine.model.architectures.common import NORMS_ON_BOTH_SIDES, SHARED_EXPERTS
from engine.model.config import QkNorm, RopeStyle
from engine.model.parts import AttentionParts, QkNormParts, RopeParts, WindowParts

ARCHITECTURES = (
    Architecture(name="exaone", rope=RopeParts(RopeStyle.NEOX, divisors=True)),
    Architecture(
        name="exaone4",
        layer=replace(NORMS_ON_BOTH_SIDES, attn_norm=(), ffn_norm=()),
        rope=RopeParts(RopeStyle.NEOX, divisors=True),
        attention=AttentionParts(
            qk_norm=QkNormParts(QkNorm.HEAD),
            window=WindowParts(period=4, default=4096, rotated_only=True, n_layers=64),
        ),
    ),
    Architecture(
        name="exaone-moe",
        rope=RopeParts(RopeStyle.NEOX, divisors=True),
        attention=AttentionParts(
            qk_norm=QkNormParts(QkNorm.HEAD),
            window=WindowParts(period=4, rotated_only=True),
        ),
        moe=SHARED_EXPERTS,
        next_token_layers=True,
    ),
)
