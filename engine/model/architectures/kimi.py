"""Kimi Linear: Kimi delta attention and latent attention without rotation."""

from engine.model.architecture import Architecture
from engine.model.parts import AttentionParts, BiasParts, MoeParts
from engine.model.recurrent_parts import Placement, Recurrence, RecurrentParts

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
)
