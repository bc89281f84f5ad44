"""Hunyuan, dense and mixture of experts, and Hunyuan 3, whose experts are chosen by sigmoid; Hunyuan 4: deepseek.py."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import DENSE_PART, HEAD_NORM, HEAD_NORM_AFTER_ROPE
from engine.model.config import RopeStyle, Routing
from engine.model.parts import FfnParts, MoeParts, RopeParts

ARCHITECTURES = (
    *(
        Architecture(
            name=name,
            rope=RopeParts(RopeStyle.NEOX, sections=RopeStyle.NEOX),
            attention=HEAD_NORM_AFTER_ROPE,
        )
        for name in ("hunyuan-dense", "hunyuan_vl")
    ),
    Architecture(
        name="hunyuan-moe",
        rope=RopeParts(RopeStyle.NEOX),
        attention=HEAD_NORM_AFTER_ROPE,
        moe=MoeParts(required=True, shared=True),
    ),
    # Layers with experts may have a dense part as well, which takes no part.
    Architecture(
        name="hy_v3",
        rope=RopeParts(RopeStyle.NEOX, divisors=True),
        attention=HEAD_NORM,
        ffn=FfnParts(scales=True),
        moe=MoeParts(
            required=True,
            routing=Routing.SIGMOID,
            normalize=None,
            weight_scale=True,
            dense_without_router=True,
            groups=True,
            width_of_used=True,
            shared=True,
            selection_bias=True,
        ),
        next_token_layers=True,
        ignored_tensors=DENSE_PART,
    ),
)
