"""Kimi Linear and Kimi K3: Kimi delta attention and latent attention without rotation.

K3 attends to earlier states of its residual stream, and its experts read and give fewer numbers than the model is wide.
"""

from dataclasses import replace

from engine.model.architecture import Architecture
from engine.model.architectures.common import QKV, RECURRENT_LAYERS, SHARED_EXPERTS
from engine.model.config import Activation, OutputGate, SkipKind
from engine.model.parts import AttentionParts, BiasParts, FfnParts, LayerParts, Placement, Recurrence, RecurrentParts

ARCHITECTURES = (
    Architecture(
        name="kimi-linear",
        rope=None,
        attention=AttentionParts(latent=True),
        recurrent=RecurrentParts(Recurrence.KIMI_DELTA, Placement.WITHOUT_KEYS),
        moe=replace(SHARED_EXPERTS, normalize=True, groups=False),
        biases=BiasParts(unused=QKV),
        unused_scales=("attn_q", "attn_k", "attn_v", "ssm_beta"),
        ignored_keys=RECURRENT_LAYERS,
    ),
    Architecture(
        name="kimi-k3",
        layer=LayerParts(skip=SkipKind.BANKED),
        rope=None,
        attention=AttentionParts(latent=True, output_gate=OutputGate.OWN),
        recurrent=RecurrentParts(Recurrence.KIMI_DELTA, Placement.WITHOUT_KEYS, decay_floor=True, negative_rates=True),
        ffn=FfnParts(Activation.SITU),
        moe=replace(SHARED_EXPERTS, shared_least=1, latent=True),
        biases=BiasParts(unused=QKV),
        unused_scales=("attn_q", "attn_k", "attn_v", "attn_gate", "attn_output", "ssm_beta"),
        ignored_keys=RECURRENT_LAYERS,
    ),
)
