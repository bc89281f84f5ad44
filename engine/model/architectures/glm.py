"""ChatGLM 3 and GLM 4 9B, GLM 4 0414 (norms on both sides), GLM 4.5 to 4.7 (mixture of experts), and dots.llm1."""

from engine.model.architecture import Architecture, MoeParts, Presence
from engine.model.config import QkNorm, RopeStyle, Routing

ARCHITECTURES = (
    Architecture(name="chatglm", rope=RopeStyle.NORM, fused_gate=Presence.OPTIONAL),
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
    Architecture(
        name="dots1",
        rope=RopeStyle.NEOX,
        qk_norm=QkNorm.HEAD,
        moe=MoeParts(
            required=True,
            normalize=None,
            weight_scale=True,
            dense_lead=True,
            shared=True,
            shared_counted=True,
            selection_bias=True,
        ),
    ),
)
