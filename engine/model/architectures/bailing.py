"""Ling and Ring (BailingMoE) 1 and 2: mixtures of many small experts with shared ones."""

from engine.model.architecture import Architecture
from engine.model.config import QkNorm, RopeStyle
from engine.model.parts import AttentionParts, MoeParts, QkNormParts, RopeParts

ARCHITECTURES = (
    Architecture(
        name="bailingmoe",
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        moe=MoeParts(required=True, normalize=None, weight_scale=True, shared=True, shared_counted=True),
        ignored_keys=("leading_dense_block_count",),  # every layer has experts
    ),
    Architecture(
        name="bailingmoe2",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD)),
        moe=MoeParts(
            required=True,
            normalize=None,
            weight_scale=True,
            dense_lead=True,
            groups=True,
            shared=True,
            shared_counted=True,
            selection_bias=True,
        ),
        next_token_layers=True,
    ),
)
