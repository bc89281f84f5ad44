"""DeepSeek 1 (shared experts), 2 to 3.1 (latent attention), 3.2 (an indexer), OCR, and families made of them."""

from dataclasses import replace

from engine.model.architecture import Architecture
from engine.model.architectures.common import SHARED_EXPERTS
from engine.model.config import IndexerKind, OutputGate, RopeStyle, Routing, SkipKind
from engine.model.parts import (
    AttentionParts,
    FfnParts,
    IndexerParts,
    LayerParts,
    Presence,
    RopeParts,
    TemperatureParts,
    WindowParts,
)

ARCHITECTURES = (
    Architecture(
        name="deepseek",
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        moe=replace(SHARED_EXPERTS, normalize=False, groups=False, selection_bias=False),
    ),
    *(
        Architecture(
            name=name,
            rope=RopeParts(RopeStyle.NORM),
            attention=AttentionParts(latent=True, temperature=TemperatureParts()),
            moe=SHARED_EXPERTS,
        )
        for name in ("deepseek2", "mistral4")
    ),
    Architecture(
        name="deepseek32",
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(latent=True, indexer=IndexerParts(IndexerKind.TOKENS, style=RopeStyle.NEOX)),
        ffn=FfnParts(scales=True),
        moe=SHARED_EXPERTS,
        next_token_layers=True,
        ignored_keys=("rope.dimension_sections",),  # of texts alone, whose axes of position are the same
    ),
    # The sizes of what is cached follow from the others.
    Architecture(
        name="dots3note",
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(
            latent=True,
            window=WindowParts(head_widths=True),
            output_gate=OutputGate.OWN,
            indexer=IndexerParts(IndexerKind.TOKENS, style=RopeStyle.NEOX),
        ),
        ffn=FfnParts(scales=True),
        moe=SHARED_EXPERTS,
        next_token_layers=True,
        ignored_keys=("attention.key_length_swa", "attention.value_length_swa", "attention.indexer.types"),
    ),
    Architecture(
        name="hy_v4",
        layer=LayerParts(skip=SkipKind.GATED),
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(
            latent=True,
            sinks=Presence.ALWAYS,
            output_gate=OutputGate.OWN,
            indexer=IndexerParts(IndexerKind.TOKENS, shared=True, rotated_last=True, optional=True, epsilon=None),
        ),
        ffn=FfnParts(limits=True, limits_gate=True),
        moe=SHARED_EXPERTS,
    ),
    Architecture(
        name="deepseek4",
        layer=LayerParts(skip=SkipKind.MIXED_AND_WEIGHTED),
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(compressed=True, window=WindowParts(), sinks=Presence.ALWAYS, output="attn_output_b"),
        ffn=FfnParts(limits=True, limits_gate=True, limits_alike=True),
        moe=replace(SHARED_EXPERTS, routing=Routing.SQRT_SOFTPLUS, dense_lead=False, groups=False, by_token=True),
        next_token_layers=True,
        ignored_keys=("embedding_length_out",),  # of what its next-token prediction reads
        ignored_tensors=("blk.*.exp_probs_b_vl.*",),  # for tokens of pictures
    ),
    # DeepSeek 2 without latent attention.
    Architecture(
        name="deepseek2-ocr",
        rope=RopeParts(RopeStyle.NEOX),
        moe=SHARED_EXPERTS,
    ),
)
