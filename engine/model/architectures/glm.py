"""ChatGLM 3 and GLM 4 9B, GLM 4 0414 (norms on both sides), GLM 4.5 to 4.7 (mixture of experts), and dots.llm1.

GLM 5 is made as DeepSeek 3.2 is; from 5.2 on several layers share an indexer's choice.
"""

from engine.model.architecture import Architecture
from engine.model.config import QkNorm, RopeStyle, Routing
from engine.model.indexer_config import IndexerKind
from engine.model.parts import (
    AttentionParts,
    FfnParts,
    IndexerParts,
    LayerParts,
    MoeParts,
    Presence,
    QkNormParts,
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
