"""GLM 4 (dense, norms on both sides) and GLM 4.5 to 4.7 (mixture of experts)."""

from engine.model.architecture import Architecture, MoeParts, Presence
from engine.model.config import QkNorm, RopeStyle, Routing

ARCHITECTURES = (
    Architecture(
        name="glm4",
        rope=RopeStyle.NORM,
        rope_sections=RopeStyle.NEOX,
        attn_post_norm=("post_attention_norm",),
        ffn_post_norm=("post_ffw_norm",),
        fused_gate=Presence.OPTIONAL,
    ),
    Architecture(
        name="glm4moe",
        rope=RopeStyle.NEOX,
        rope_sections=RopeStyle.NEOX,
        ffn_norm=("post_attention_norm",),
        qk_norm=QkNorm.HEAD,
        qk_norm_presence=Presence.OPTIONAL,
        moe=MoeParts(
            required=True,
            routing=Routing.SIGMOID,
            normalize=None,
            weight_scale=True,
            dense_lead=True,
            shared=True,
            shared_counted=True,
            selection_bias=True,
        ),
        next_token_layers=True,
    ),
)
