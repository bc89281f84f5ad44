"""Llama with LayerNorm: Orion, Nemotron, StableLM, Jais 1 and 2."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import LAYER_NORM
from engine.model.config import Activation, QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    BiasParts,
    FfnParts,
    LayerParts,
    Parallel,
    Presence,
    QkNormParts,
    RopeParts,
)

ARCHITECTURES = (
    Architecture(name="orion", norm=LAYER_NORM, rope=RopeParts(RopeStyle.NEOX)),
    Architecture(
        name="nemotron",
        norm=LAYER_NORM,
        rope=RopeParts(RopeStyle.NEOX),
        ffn=FfnParts(Activation.RELU_SQUARED, gated=False),
    ),
    Architecture(
        name="stablelm",
        norm=LAYER_NORM,
        layer=LayerParts(ffn_norm=("ffn_norm", "attn_norm"), parallel=Parallel.WITHOUT_NORM),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.EACH_HEAD, presence=Presence.OPTIONAL)),
    ),
    Architecture(
        name="jais",
        norm=LAYER_NORM,
        rope=None,
        attention=AttentionParts(alibi=0.0, linear_scale=True),
        biases=BiasParts(required=("attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    ),
    Architecture(
        name="jais2",
        norm=LAYER_NORM,
        rope=RopeParts(RopeStyle.NEOX),
        ffn=FfnParts(Activation.RELU_SQUARED, gated=False),
        biases=BiasParts(required=("attn_output", "ffn_up", "ffn_down")),
    ),
)
