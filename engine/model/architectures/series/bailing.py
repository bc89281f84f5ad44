"""Ling and Ring (BailingMoE): mixtures of many small experts with shared ones.

The third generation has Kimi delta attention and latent attention with a gate for each head.
"""

from engine.model.architecture import Architecture
from engine.model.config import OutputGate, QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    BiasParts,
    FfnParts,
    MoeParts,
    Placement,
    QkNormParts,
    Recurrence,
    RecurrentParts,
    RopeParts,
)

# No projection of a mixer takes its scale or bias.
_QKV = ("attn_q", "attn_k", "attn_v")
_LATENT = ("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_gate", "attn_output")
_KIMI_DELTA = ("ssm_f_a", "ssm_g_a", "ssm_beta")

ARCHITECTURES = (
    Architecture(
        name="bailingmoe",
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        moe=MoeParts(required=True, normalize=None, weight_scale=True, shared=True, shared_counted=True),
        ignored_keys=("leading_dense_block_count",),  # every layer has experts
    ),
    Architecture(
        name="bailingmoe2",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD)),
        moe=MoeParts(
            required=True,
            normalize=None,
            weight_scale=True,
            dense_lead=True,
            groups=True,
            shared=True,
            shared_counted=True,
            selection_bias=True,
        ),
        next_token_layers=True,
    ),
    Architecture(
        name="bailingmoe3",
        rope=RopeParts(RopeStyle.NORM, sections=RopeStyle.NEOX),
        attention=AttentionParts(latent=True, output_gate=OutputGate.PER_HEAD),
        recurrent=RecurrentParts(Recurrence.KIMI_DELTA, Placement.WITHOUT_KEYS, decay_floor=True),
        ffn=FfnParts(limits=True),
        moe=MoeParts(
            required=True,
            normalize=None,
            weight_scale=True,
            dense_lead=True,
            groups=True,
            shared=True,
            shared_counted=True,
            shared_least=1,
            selection_bias=True,
        ),
        biases=BiasParts(unused=_QKV),
        unused_scales=_QKV + _LATENT + _KIMI_DELTA,
        next_token_layers=True,
        # Which layers recur shows in their numbers of key heads. Only gates with a floor exist.
        ignored_keys=("attention.recurrent_layers", "kda.safe_gate"),
    ),
)
