"""Granite 3, 4 and MiniCPM: Llama with multipliers on embeddings, residuals, attention scores and logits.

Granite 4 has Mamba 2 in most layers. MiniCPM 3 has latent attention, and the multipliers of MiniCPM's old files.
"""

from engine.model.architecture import Architecture
from engine.model.architectures.common import RECURRENT_LAYERS
from engine.model.config import RopeStyle
from engine.model.parts import (
    AttentionParts,
    EmbeddingParts,
    FfnParts,
    HeadParts,
    LayerParts,
    LogitScale,
    MoeParts,
    Placement,
    Presence,
    Recurrence,
    RecurrentParts,
    RopeParts,
    WindowParts,
)

_MOE = MoeParts(normalize=True, weight_scale=True, shared=True)

ARCHITECTURES = (
    *(
        Architecture(
            name=name,
            embedding=EmbeddingParts(scale=0.0),
            layer=LayerParts(residual_scale=0.0),
            rope=RopeParts(RopeStyle.NORM, switch=True, long_factors=True, divisors=True),
            attention=AttentionParts(scale=True),
            moe=_MOE,
            head=HeadParts(scale=LogitScale.DIVIDES),
        )
        for name in ("granite", "granitemoe")
    ),
    Architecture(
        name="granite_swa",
        embedding=EmbeddingParts(scale=0.0),
        layer=LayerParts(residual_scale=0.0),
        rope=RopeParts(RopeStyle.NORM, pattern=True, long_factors=True, divisors=True),
        attention=AttentionParts(window=WindowParts(period=0), scale=True, sinks=Presence.ALWAYS),
        ffn=FfnParts(fused_gate=Presence.OPTIONAL),
        moe=_MOE,
        head=HeadParts(scale=LogitScale.DIVIDES),
    ),
    Architecture(
        name="minicpm",
        embedding=EmbeddingParts(scale=12.0),
        layer=LayerParts(residual_scale=1.4),
        rope=RopeParts(RopeStyle.NORM, long_factors=True, divisors=True),
        attention=AttentionParts(scale=True),
        moe=_MOE,
        head=HeadParts(scale=LogitScale.DIVIDES, scale_width=256),
    ),
    Architecture(
        name="minicpm3",
        embedding=EmbeddingParts(scale=12.0),
        layer=LayerParts(residual_scale=1.4),
        rope=RopeParts(RopeStyle.NEOX, long_factors=True),
        attention=AttentionParts(latent=True),
        head=HeadParts(scale=LogitScale.DIVIDES, scale_width=256),
        unused_scales=("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b"),
    ),
    Architecture(
        name="granitehybrid",
        embedding=EmbeddingParts(scale=0.0),
        layer=LayerParts(residual_scale=0.0),
        rope=RopeParts(RopeStyle.NORM, switch=True, long_factors=True, divisors=True),
        attention=AttentionParts(scale=True),
        recurrent=RecurrentParts(Recurrence.MAMBA_2, Placement.WITHOUT_KEYS),
        moe=_MOE,
        head=HeadParts(scale=LogitScale.DIVIDES),
        ignored_keys=RECURRENT_LAYERS,
    ),
)
