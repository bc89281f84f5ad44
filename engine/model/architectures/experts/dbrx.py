"""DBRX: LayerNorm, clamped queries, keys and values."""

from engine.model.architecture import Architecture
from engine.model.config import NormKind, RopeStyle
from engine.model.parts import AttentionParts, LayerParts, MoeParts, NormParts, RopeParts

ARCHITECTURES = (
    Architecture(
        name="dbrx",
        norm=NormParts(NormKind.LAYER),
        layer=LayerParts(ffn_norm=("attn_output_norm",)),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(clamp=True),
        moe=MoeParts(required=True, weight_scale=True),
    ),
)
