"""Qwen 1, 2, 2.5 and 3, dense and mixture of experts, and the text side of the models that take pictures."""

from engine.model.architecture import Architecture
from engine.model.config import QkNorm, RopeStyle
from engine.model.parts import AttentionParts, BiasParts, FfnParts, MoeParts, QkNormParts, RopeParts

_SECTIONED = RopeParts(RopeStyle.NEOX, sections=RopeStyle.NEOX)
_HEAD_NORM = AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD))

ARCHITECTURES = (
    # feed_forward_length counts the rows of gate and up together.
    Architecture(
        name="qwen",
        rope=RopeParts(RopeStyle.NEOX),
        ffn=FfnParts(width_divisor=2),
        biases=BiasParts(required=("attn_qkv",)),
    ),
    Architecture(name="qwen2", rope=RopeParts(RopeStyle.NEOX)),
    Architecture(
        name="qwen2moe",
        rope=RopeParts(RopeStyle.NEOX),
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
    Architecture(name="qwen2vl", rope=_SECTIONED),
    # cls.* is the head of the reranker variants, beside the language-model head.
    *(
        Architecture(
            name=name,
            rope=_SECTIONED,
            attention=_HEAD_NORM,
            ffn=FfnParts(scales=True),
            ignored_tensors=("cls.weight", "cls.bias", "cls.output.weight", "cls.output.bias"),
        )
        for name in ("qwen3", "qwen3vl")
    ),
    *(
        Architecture(
            name=name,
            rope=_SECTIONED,
            attention=_HEAD_NORM,
            ffn=FfnParts(scales=True),
            moe=MoeParts(required=True, normalize=True, weight_scale=True, width_of_used=True),
        )
        for name in ("qwen3moe", "qwen3vlmoe")
    ),
)
