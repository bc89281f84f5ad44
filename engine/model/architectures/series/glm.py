"""ChatGLM 3 and GLM 4 9B, GLM 4 0414 (norms on both sides), GLM 4.5 to 4.7 (mixture of experts), and dots.llm1.

GLM 5 is made as DeepSeek 3.2 is; from 5.2 on several layers share an indexer's choice. GLM 5.3 Flash (glm5-next) has
Kimi delta attention and streams that mix.
"""

from engine.model.architecture import Architecture
from engine.model.config import IndexerKind, QkNorm, RopeStyle, Routing, SkipKind
from engine.model.parts import (
    AttentionParts,
    BiasParts,
    FfnParts,
    IndexerParts,
    LayerParts,
    MoeParts,
    Placement,
    Presence,
    QkNormParts,
    Recurrence,
    RecurrentParts,
    RopeParts,
)

ARCHITECTURES = (
    Architecture(
        name="chatglm",
        rope=RopeParts(RopeStyle.NORM),
        ffn=FfnParts(fused_gate=Presence.OPTIONAL),
    ),
    Architecture(
        name="glm4",
        layer=LayerParts(attn_post_norm=("post_attention_norm",), ffn_post_norm=("post_ffw_norm",)),
        rope=RopeParts(RopeStyle.NORM, sections=RopeStyle.NEOX),
        ffn=FfnParts(fused_gate=Presence.OPTIONAL),
    ),
    Architecture(
        name="glm4moe",
        layer=LayerParts(ffn_norm=("post_attention_norm",)),
        rope=RopeParts(RopeStyle.NEOX, sections=RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD, presence=Presence.OPTIONAL)),
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
        name="glm-dsa",
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(
            latent=True, indexer=IndexerParts(IndexerKind.TOKENS, shared=True, shared_context=1048576)
        ),
        ffn=FfnParts(scales=True),
        moe=MoeParts(
            required=True,
            routing=Routing.SIGMOID,
            normalize=None,
            weight_scale=True,
            dense_lead=True,
            groups=True,
            shared=True,
            shared_counted=True,
            selection_bias=True,
        ),
        next_token_layers=True,
        ignored_keys=("rope.dimension_sections",),  # of texts alone, whose axes of position are the same
    ),
    Architecture(
        name="glm5-next",
        layer=LayerParts(skip=SkipKind.MIXED),
        rope=None,
        attention=AttentionParts(latent=True, indexer=IndexerParts(IndexerKind.GATED_POOLS, shared=True)),
        recurrent=RecurrentParts(
            Recurrence.KIMI_DELTA, Placement.WITHOUT_KEYS, decay_floor=True, negative_rates=True, unit_epsilon=1e-6
        ),
        ffn=FfnParts(limits=True, limits_gate=True, limits_alike=True),
        moe=MoeParts(
            required=True,
            routing=Routing.SIGMOID,
            normalize=None,
            weight_scale=True,
            dense_lead=True,
            groups=True,
            shared=True,
            shared_counted=True,
            selection_bias=True,
        ),
        biases=BiasParts(unused=("attn_q", "attn_k", "attn_v")),
        unused_scales=("attn_q", "attn_k", "attn_v", "attn_output", "ssm_beta"),
        next_token_layers=True,
        # Which layers recur shows in their numbers of key heads.
        ignored_keys=("attention.recurrent_layers",),
    ),
    Architecture(
        name="dots1",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD)),
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
