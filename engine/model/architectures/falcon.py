"""Falcon 7B and 40B: attention and feed-forward side by side, in larger models each behind a norm of its own."""

from engine.model.architecture import Architecture, Parallel, Presence
from engine.model.config import Activation, NormKind, RopeStyle

ARCHITECTURES = (
    Architecture(
        name="falcon",
        rope=RopeStyle.NEOX,
        norm=NormKind.LAYER,
        norm_bias=Presence.ALWAYS,
        attn_norm=("attn_norm_2", "attn_norm"),
        ffn_norm=("attn_norm",),
        parallel=Parallel.ALWAYS,
        activation=Activation.GELU,
        gated=False,
    ),
)
