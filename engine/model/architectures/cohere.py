"""Command R and Command A: one LayerNorm without bias for attention and feed-forward side by side."""

from engine.model.architecture import Architecture, LogitScale, Parallel, Presence, WindowParts
from engine.model.config import NormKind, QkNorm, RopeStyle

ARCHITECTURES = (
    Architecture(
        name="command-r",
        rope=RopeStyle.NORM,
        norm=NormKind.LAYER,
        ffn_norm=("attn_norm",),
        parallel=Parallel.ALWAYS,
        qk_norm=QkNorm.EACH_HEAD,
        qk_norm_presence=Presence.OPTIONAL,
        logit_scale=LogitScale.MULTIPLIES,
    ),
    Architecture(
        name="cohere2",
        rope=RopeStyle.NORM,
        norm=NormKind.LAYER,
        ffn_norm=("attn_norm",),
        parallel=Parallel.ALWAYS,
        window=WindowParts(period=4, rotated_only=True),
        ffn_scale=True,
        logit_scale=LogitScale.MULTIPLIES,
    ),
)
