"""Phi 2, 3, 4 and Phi-MoE."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import LAYER_NORM, SIDE_BY_SIDE
from engine.model.config import Activation, RopeStyle
from engine.model.parts import BiasParts, FfnParts, MoeParts, NormParts, Presence, RopeParts

ARCHITECTURES = (
    Architecture(
        name="phi2",
        norm=LAYER_NORM,
        layer=SIDE_BY_SIDE,
        rope=RopeParts(RopeStyle.NEOX),
        ffn=FfnParts(Activation.GELU, gated=False),
        biases=BiasParts(required=("attn_output", "ffn_up", "ffn_down")),
    ),
    # Files of Phi 3 hold a sliding window that llama.cpp does not apply, as many are wrong.
    Architecture(
        name="phi3",
        rope=RopeParts(RopeStyle.NEOX, long_factors=True),
        ffn=FfnParts(fused_gate=Presence.OPTIONAL),
        ignored_keys=("attention.sliding_window",),
    ),
    Architecture(
        name="phimoe",
        norm=NormParts(bias=Presence.ALWAYS),
        rope=RopeParts(RopeStyle.NEOX, long_factors=True),
        moe=MoeParts(required=True, normalize=True, weight_scale=True),
        ignored_keys=("attention.sliding_window",),
    ),
)
