"""Families of attention and state spaces: Jamba, Nemotron-H, Granite 4, Falcon-H1 and PLaMo 2."""

from engine.model.architecture import Architecture
from engine.model.config import Activation, QkNorm, RopeStyle, Routing
from engine.model.parts import (
    AttentionParts,
    BiasParts,
    EmbeddingParts,
    FfnParts,
    HeadParts,
    LayerParts,
    LogitScale,
    MoeParts,
    NormParts,
    Placement,
    Presence,
    QkNormParts,
    Recurrence,
    RecurrentParts,
    RopeParts,
)

# Which layers recur shows in their numbers of key heads.
_RECURRENT_LAYERS = ("attention.recurrent_layers",)

ARCHITECTURES = (
    Architecture(
        name="jamba",
        rope=None,
        recurrent=RecurrentParts(Recurrence.MAMBA, Placement.WITHOUT_KEYS, norm_weights=True),
        moe=MoeParts(normalize=False, weight_scale=True, dense_without_router=True),
        ignored_keys=_RECURRENT_LAYERS,
    ),
    *(
        Architecture(
            name=name,
            norm=NormParts(either_epsilon=True),
            layer=LayerParts(ffn_norm=("attn_norm",), one_part=True),
            rope=None,
            attention=AttentionParts(scale=True),
            recurrent=RecurrentParts(Recurrence.MAMBA_2, Placement.WITHOUT_KEYS),
            ffn=FfnParts(Activation.RELU_SQUARED, gated=False, scales=True),
            moe=MoeParts(
                normalize=None,
                weight_scale=True,
                dense_without_router=True,
                routing=Routing.SIGMOID,
                shared=True,
                selection_bias=True,
            ),
            next_token_layers=True,
            ignored_keys=_RECURRENT_LAYERS,
        )
        for name in ("nemotron_h", "nemotron_h_moe")
    ),
    Architecture(
        name="granitehybrid",
        embedding=EmbeddingParts(scale=0.0),
        layer=LayerParts(residual_scale=0.0),
        rope=RopeParts(RopeStyle.NORM, switch=True, long_factors=True, divisors=True),
        attention=AttentionParts(scale=True),
        recurrent=RecurrentParts(Recurrence.MAMBA_2, Placement.WITHOUT_KEYS),
        moe=MoeParts(normalize=True, weight_scale=True, shared=True),
        head=HeadParts(scale=LogitScale.DIVIDES),
        ignored_keys=_RECURRENT_LAYERS,
    ),
    Architecture(
        name="falcon-h1",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(scale=True),
        recurrent=RecurrentParts(Recurrence.MAMBA_2, Placement.BESIDE_ATTENTION),
        biases=BiasParts(unused=("attn_output",)),
        ignored_keys=_RECURRENT_LAYERS,
        ignored_tensors=("rope_freqs.weight",),
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
)
