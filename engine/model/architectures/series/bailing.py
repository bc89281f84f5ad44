"""Ling and Ring (BailingMoE): mixtures of many small experts with shared ones.

The third generation has Kimi delta attention and latent attention with a gate for each head.
"""

from dataclasses import replace

from engine.model.architecture import Architecture
from engine.model.architectures.common import HEAD_NORM, QKV, RECURRENT_LAYERS, SHARED_EXPERTS
from engine.model.config import OutputGate, RopeStyle
from engine.model.parts import AttentionParts, BiasParts, FfnParts, Placement, Recurrence, RecurrentParts, RopeParts

# No projection of a mixer takes its scale.
_LATENT = ("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_gate", "attn_output")
_KIMI_DELTA = ("ssm_f_a", "ssm_g_a", "ssm_beta")

ARCHITECTURES = (
    Architecture(
        name="bailingmoe",
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        moe=replace(SHARED_EXPERTS, dense_lead=False, groups=False, selection_bias=False),
        ignored_keys=("leading_dense_block_count",),  # every layer has experts
    ),
    Architecture(
        name="bailingmoe2",
        rope=RopeParts(RopeStyle.NEOX),
        attention=HEAD_NORM,
        moe=SHARED_EXPERTS,
        next_token_layers=True,
    ),
    Architecture(
        name="bailingmoe3",
        rope=RopeParts(RopeStyle.NORM, sections=RopeStyle.NEOX),
        attention=AttentionParts(latent=True, output_gate=OutputGate.PER_HEAD),
        recurrent=RecurrentParts(Recurrence.KIMI_DELTA, Placement.WITHOUT_KEYS, decay_floor=True),
        ffn=FfnParts(limits=True),
        moe=replace(SHARED_EXPERTS, shared_least=1),
        biases=BiasParts(unused=QKV),
        unused_scales=QKV + _LATENT + _KIMI_DELTA,
        next_token_layers=True,
        # Only gates with a floor exist.
        ignored_keys=(*RECURRENT_LAYERS, "kda.safe_gate"),
    ),
)
