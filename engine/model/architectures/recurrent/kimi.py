"""Kimi Linear and Kimi K3: Kimi delta attention and latent attention without rotation.

K3 attends to earlier states of its residual stream, and its experts read and give fewer numbers than the model is wide.
"""

from engine.model.architecture import Architecture
from engine.model.config import Activation, OutputGate, SkipKind
from engine.model.parts import (
    AttentionParts,
    BiasParts,
    FfnParts,
    LayerParts,
    MoeParts,
    Placement,
    Recurrence,
    RecurrentParts,
)

ARCHITECTURES = (
    Architecture(
        name="kimi-linear",
        rope=None,
        attention=AttentionParts(latent=True),
        recurrent=RecurrentParts(Recurrence.KIMI_DELTA, Placement.WITHOUT_KEYS),
        moe=MoeParts(
            required=True,
            normalize=True,
            weight_scale=True,
            dense_lead=True,
            shared=True,
            shared_counted=True,
            selection_bias=True,
        ),
        biases=BiasParts(unused=("attn_q", "attn_k", "attn_v")),
        unused_scales=("attn_q", "attn_k", "attn_v", "ssm_beta"),
        # Which layers recur shows in their numbers of key heads.
        ignored_keys=("attention.recurrent_layers",),
    ),
    Architecture(
        name="kimi-k3",
        layer=LayerParts(skip=SkipKind.BANKED),
        rope=None,
        attention=AttentionParts(latent=True, output_gate=OutputGate.OWN),
        recurrent=RecurrentParts(Recurrence.KIMI_DELTA, Placement.WITHOUT_KEYS, decay_floor=True, negative_rates=True),
        ffn=FfnParts(Activation.SITU),
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
            latent=True,
        ),
        biases=BiasParts(unused=("attn_q", "attn_k", "attn_v")),
        unused_scales=("attn_q", "attn_k", "attn_v", "attn_gate", "attn_output", "ssm_beta"),
        ignored_keys=("attention.recurrent_layers",),
    ),
)
