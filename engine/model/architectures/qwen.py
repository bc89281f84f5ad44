"""Qwen 2, 2.5 and 3, dense and mixture of experts, and the text side of those that see."""

from engine.model.architecture import Architecture, MoeParts
from engine.model.config import QkNorm, RopeStyle

ARCHITECTURES = (
    Architecture(name="qwen2", rope=RopeStyle.NEOX),
    Architecture(
        name="qwen2moe",
        rope=RopeStyle.NEOX,
        moe=MoeParts(
            required=True,
            normalize=False,
            weight_scale=True,
            width_of_used=True,
            shared=True,
            shared_like_dense=True,
            shared_gate=True,
        ),
    ),
    Architecture(name="qwen2vl", rope=RopeStyle.NEOX, rope_sections=RopeStyle.NEOX),
    # cls.* is the head of the reranker variants, beside the language-model head.
    *(
        Architecture(
            name=name,
            rope=RopeStyle.NEOX,
            rope_sections=RopeStyle.NEOX,
            qk_norm=QkNorm.HEAD,
            ffn_scale=True,
            ignored_tensors=("cls.weight", "cls.bias", "cls.output.weight", "cls.output.bias"),
        )
        for name in ("qwen3", "qwen3vl")
    ),
    *(
        Architecture(
            name=name,
            rope=RopeStyle.NEOX,
            rope_sections=RopeStyle.NEOX,
            qk_norm=QkNorm.HEAD,
            ffn_scale=True,
            moe=MoeParts(required=True, normalize=True, weight_scale=True, width_of_used=True),
        )
        for name in ("qwen3moe", "qwen3vlmoe")
    ),
)
