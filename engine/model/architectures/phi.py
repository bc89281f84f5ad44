"""Phi 2, 3, 4 and Phi-MoE."""

from engine.model.architecture import Architecture, MoeParts, Parallel, Presence
from engine.model.config import Activation, NormKind, RopeStyle

ARCHITECTURES = (
    Architecture(
        name="phi2",
        rope=RopeStyle.NEOX,
        norm=NormKind.LAYER,
        norm_bias=Presence.ALWAYS,
        ffn_norm=("attn_norm",),
        parallel=Parallel.ALWAYS,
        biases=("attn_output", "ffn_up", "ffn_down"),
        activation=Activation.GELU,
        gated=False,
    ),
    # attention.sliding_window is in its files but stands for no window that the weights were trained with everywhere;
    # llama.cpp leaves it out too.
    Architecture(name="phi3", rope=RopeStyle.NEOX, fused_gate=Presence.OPTIONAL, longrope=True),
    Architecture(
        name="phimoe",
        rope=RopeStyle.NEOX,
        norm_bias=Presence.ALWAYS,
        longrope=True,
        moe=MoeParts(required=True, normalize=True, weight_scale=True),
    ),
)
