"""Grok: capped attention scores, norms on both sides of every part, and a dense part beside the experts."""

import math

from engine.model.architecture import Architecture
from engine.model.config import Activation, RopeStyle
from engine.model.parts import (
    AttentionParts,
    EmbeddingParts,
    FfnParts,
    HeadParts,
    LayerParts,
    LogitScale,
    MoeParts,
    RopeParts,
)

# Old files leave out the numbers of Grok 1, which are the defaults here.
ARCHITECTURES = (
    Architecture(
        name="grok",
        embedding=EmbeddingParts(scale=78.38367176906169),
        layer=LayerParts(attn_post_norm=("attn_output_norm",), ffn_post_norm=("layer_output_norm", "post_ffw_norm")),
        rope=RopeParts(RopeStyle.NEOX, beta_fast=8.0),
        attention=AttentionParts(softcap=30.0, output_scale=0.08838834764831845),
        ffn=FfnParts(Activation.GELU),
        moe=MoeParts(required=True, groups=True, shared=True, shared_named_dense=True, shared_factor=math.sqrt(0.5)),
        head=HeadParts(scale=LogitScale.MULTIPLIES, scale_default=0.5773502691896257, softcap=0.0),
    ),
)
