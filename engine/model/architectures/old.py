"""Families of 2023 and 2024 that had no successors: Refact, PLaMo 1, OpenELM, Jais 1 and 2, and Arctic."""

from engine.model.architecture import Architecture
from engine.model.config import Activation, NormKind, QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    BiasParts,
    FfnParts,
    LayerParts,
    MoeParts,
    NormParts,
    Parallel,
    Presence,
    QkNormParts,
    RopeParts,
)

_LAYER_NORM = NormParts(NormKind.LAYER, bias=Presence.ALWAYS)

ARCHITECTURES = (
    # Files may hold biases and factors of rotation that take no part.
    Architecture(
        name="refact",
        rope=None,
        attention=AttentionParts(alibi=8.0),
        biases=BiasParts(unused=("attn_output", "ffn_gate", "ffn_up", "ffn_down")),
        ignored_tensors=("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"),
    ),
    Architecture(
        name="plamo",
        layer=LayerParts(ffn_norm=("attn_norm",), parallel=Parallel.ALWAYS),
        rope=RopeParts(RopeStyle.NEOX),
    ),
    Architecture(
        name="openelm",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD)),
        unused_scales=("attn_qkv",),
    ),
    Architecture(
        name="jais",
        norm=_LAYER_NORM,
        rope=None,
        attention=AttentionParts(alibi=0.0, linear_scale=True),
        biases=BiasParts(required=("attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    ),
    Architecture(
        name="jais2",
        norm=_LAYER_NORM,
        rope=RopeParts(RopeStyle.NEOX),
        ffn=FfnParts(Activation.RELU_SQUARED, gated=False),
        biases=BiasParts(required=("attn_output", "ffn_up", "ffn_down")),
    ),
    # Experts that read the layer's input run beside attention and a small dense part.
    Architecture(
        name="arctic",
        rope=RopeParts(RopeStyle.NORM),
        moe=MoeParts(required=True, groups=True, shared=True, shared_named_dense=True, reads_input=True),
    ),
)
