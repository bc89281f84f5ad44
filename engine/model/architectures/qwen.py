"""Qwen 2, 2.5 and 3, dense and mixture of experts."""

from engine.model.architecture import Architecture, MoeParts
from engine.model.config import RopeStyle

ARCHITECTURES = (
    Architecture(name="qwen2", rope=RopeStyle.NEOX, ffn_scale=False),
    Architecture(
        name="qwen2moe",
        rope=RopeStyle.NEOX,
        ffn_scale=False,
        moe=MoeParts(required=True, normalize=False, weight_scale=True, shared=True, shared_gate=True),
    ),
    # cls.* is the head of the reranker variants, beside the language-model head.
    Architecture(
        name="qwen3",
        rope=RopeStyle.NEOX,
        qk_norm=True,
        ignored_tensors=("cls.weight", "cls.bias", "cls.output.weight", "cls.output.bias"),
    ),
    Architecture(
        name="qwen3moe",
        rope=RopeStyle.NEOX,
        qk_norm=True,
        moe=MoeParts(required=True, normalize=True, weight_scale=True),
    ),
)
