"""PLaMo 1 (attention and feed-forward side by side), 2 (Mamba in most layers) and 3 (windows)."""

from engine.model.architecture import Architecture
from engine.model.config import QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    FfnParts,
    LayerParts,
    Parallel,
    Placement,
    Presence,
    QkNormParts,
    Recurrence,
    RecurrentParts,
    RopeParts,
    WindowParts,
)

# Which layers recur shows in their numbers of key heads.
_RECURRENT_LAYERS = ("attention.recurrent_layers",)

ARCHITECTURES = (
    Architecture(
        name="plamo",
        layer=LayerParts(ffn_norm=("attn_norm",), parallel=Parallel.ALWAYS),
        rope=RopeParts(RopeStyle.NEOX),
    ),
    Architecture(
        name="plamo2",
        layer=LayerParts(attn_post_norm=("post_attention_norm",), ffn_post_norm=("post_ffw_norm",)),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.EACH_HEAD)),
        recurrent=RecurrentParts(Recurrence.PLAMO_2, Placement.WITHOUT_KEYS),
        ffn=FfnParts(fused_gate=Presence.ALWAYS),
        unused_scales=("attn_qkv", "ssm_in", "ssm_x", "ssm_dt", "ssm_out"),
        ignored_keys=_RECURRENT_LAYERS,
    ),
    Architecture(
        name="plamo3",
        layer=LayerParts(attn_post_norm=("post_attention_norm",), ffn_post_norm=("post_ffw_norm",)),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD), window=WindowParts(period=8)),
        ffn=FfnParts(fused_gate=Presence.ALWAYS),
        unused_scales=("attn_qkv",),
    ),
)
