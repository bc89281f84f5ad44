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
    # Files of Phi 3 hold a sliding window that llama.cpp does not apply, as many are wrong.
    Architecture(
        name="phi3",
        rope=RopeStyle.NEOX,
        fused_gate=Presence.OPTIONAL,
        longrope=True,
        ignored_keys=("attention.sliding_window",),
    ),
    Architecture(
        name="phimoe",
        rope=RopeStyle.NEOX,
        norm_bias=Presence.ALWAYS,
        longrope=True,
        ignored_keys=("attention.sliding_window",),
        moe=MoeParts(required=True, normalize=True, weight_scale=True),
    ),
)
