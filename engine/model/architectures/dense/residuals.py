"""Other residual connections: HRM (two stacks of layers in turns) and Talkie (the embedding joins every layer)."""

from engine.model.architecture import Architecture
from engine.model.config import OutputGate, QkNorm, QkWeights, RopeStyle, SkipKind
from engine.model.parts import (
    AttentionParts,
    EmbeddingParts,
    FfnParts,
    HeadParts,
    LayerParts,
    LogitScale,
    NormParts,
    QkNormParts,
    RopeParts,
)

ARCHITECTURES = (
    # A low and a high stack of layers in turns. As in llama.cpp attention is causal, whatever hrm.prefix_lm says.
    Architecture(
        name="hrm_text",
        embedding=EmbeddingParts(scale=0.0),
        norm=NormParts(weight=False),
        layer=LayerParts(skip=SkipKind.STACKS),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(output_gate=OutputGate.OWN),
        head=HeadParts(norm=None),
        unused_scales=("attn_gate",),
        ignored_keys=("hrm.prefix_lm",),
    ),
    # Norms have no weights; queries have a number for each head.
    Architecture(
        name="talkie",
        embedding=EmbeddingParts(bare_norm=True),
        norm=NormParts(weight=False),
        layer=LayerParts(embedding_skip=True),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.EACH_HEAD, after_rope=True, weights=QkWeights.QUERY_GAINS)),
        ffn=FfnParts(scales=True),
        head=HeadParts(scale=LogitScale.MULTIPLIES),
    ),
)
