"""ChatGLM 3 and GLM 4 9B, GLM 4 0414 (norms on both sides), GLM 4.5 to 4.7 (mixture of experts), and dots.llm1.

GLM 5 is made as DeepSeek 3.2 is; from 5.2 on several layers share an indexer's choice. GLM 5.3 Flash (glm5-next) has
Kimi delta attention and streams that mix.
"""

from dataclasses import replace

from engine.model.architecture import Architecture
from engine.model.architectures.common import (
    HEAD_NORM,
    NORMS_ON_BOTH_SIDES,
    QKV,
    RECURRENT_LAYERS,
    SHARED_EXPERTS,
    SHARED_EXPERTS_BY_SIGMOID,
)
from engine.model.config import IndexerKind, QkNorm, RopeStyle, SkipKind
from engine.model.parts import (
    AttentionParts,
    BiasParts,
    FfnParts,
    IndexerParts,
    LayerParts,
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
        layer=NORMS_ON_BOTH_SIDES,
        rope=RopeParts(RopeStyle.NORM, sections=RopeStyle.NEOX),
        ffn=FfnParts(fused_gate=Presence.OPTIONAL),
    ),
    Architecture(
        name="glm4moe",
        layer=LayerParts(ffn_norm=("post_attention_norm",)),
        rope=RopeParts(RopeStyle.NEOX, sections=RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD, presence=Presence.OPTIONAL)),
        moe=replace(SHARED_EXPERTS_BY_SIGMOID, groups=False),
        next_token_layers=True,
    ),
    Architecture(
        name="glm-dsa",
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(
            latent=True, indexer=IndexerParts(IndexerKind.TOKENS, shared=True, shared_context=1048576)
        ),
        ffn=FfnParts(scales=True),
        moe=SHARED_EXPERTS_BY_SIGMOID,
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
        moe=SHARED_EXPERTS_BY_SIGMOID,
        biases=BiasParts(unused=QKV),
        unused_scales=("attn_q", "attn_k", "attn_v", "attn_output", "ssm_beta"),
        next_token_layers=True,
        ignored_keys=RECURRENT_LAYERS,
    ),
    Architecture(
        name="dots1",
        rope=RopeParts(RopeStyle.NEOX),
        attention=HEAD_NORM,
        moe=replace(SHARED_EXPERTS, groups=False),
    ),
)
