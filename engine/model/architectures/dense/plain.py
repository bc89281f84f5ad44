"""Llama but for names of norms, biases, norms of queries and keys, and layers that do not rotate."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import HEAD_NORM, HEAD_NORM_AFTER_ROPE
from engine.model.config import RopeStyle
from engine.model.parts import BiasParts, LayerParts, RopeParts

ARCHITECTURES = (
    Architecture(name="internlm2", rope=RopeParts(RopeStyle.NORM)),
    Architecture(name="xverse", rope=RopeParts(RopeStyle.NORM)),
    Architecture(name="smollm3", rope=RopeParts(RopeStyle.NORM, skip_every=4)),
    Architecture(
        name="seed_oss",
        layer=LayerParts(ffn_norm=("post_attention_norm",)),
        rope=RopeParts(RopeStyle.NEOX),
    ),
    Architecture(
        name="openelm",
        rope=RopeParts(RopeStyle.NEOX),
        attention=HEAD_NORM,
        unused_scales=("attn_qkv",),
    ),
    Architecture(
        name="maincoder",
        rope=RopeParts(RopeStyle.NORM),
        attention=HEAD_NORM_AFTER_ROPE,
    ),
    Architecture(
        name="pangu-embedded",
        rope=RopeParts(RopeStyle.NEOX),
        biases=BiasParts(required=("attn_output",)),
        ignored_tensors=("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"),
    ),
)
