"""MiMo 2: windows with a base of their own, attention sinks, and sigmoid routing of experts."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import DENSE_PART
from engine.model.config import RopeStyle, Routing
from engine.model.parts import AttentionParts, BiasParts, MoeParts, Presence, RopeParts, WindowParts

_QKV = ("attn_q", "attn_k", "attn_v", "attn_qkv")

ARCHITECTURES = (
    # Layers with experts may have a dense part as well, which takes no part.
    Architecture(
        name="mimo2",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(
            window=WindowParts(base=10000.0, unscaled=True), sinks=Presence.OPTIONAL, value_scale=True
        ),
        moe=MoeParts(
            routing=Routing.SIGMOID, normalize=True, dense_without_router=True, groups=True, selection_bias=True
        ),
        biases=BiasParts(unused=(*_QKV, "attn_output")),
        unused_scales=_QKV,
        next_token_layers=True,
        ignored_tensors=DENSE_PART,
    ),
)
