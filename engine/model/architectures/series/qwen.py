"""Qwen 1 to 3.5, dense and mixture of experts, and the text side of the models that take pictures."""

from dataclasses import replace

from engine.model.architecture import Architecture
from engine.model.architectures.common import HEAD_NORM, QKV
from engine.model.config import IndexerKind, OutputGate, QkNorm, RopeStyle, SkipKind
from engine.model.parts import (
    AttentionParts,
    BiasParts,
    FfnParts,
    HeadParts,
    IndexerParts,
    LayerParts,
    MoeParts,
    Placement,
    QkNormParts,
    RankParts,
    Recurrence,
    RecurrentParts,
    RopeParts,
)

_SECTIONED = RopeParts(RopeStyle.NEOX, sections=RopeStyle.NEOX)
# What is called a norm behind attention comes before the feed-forward part.
_HYBRID_LAYER = LayerParts(ffn_norm=("post_attention_norm",))
_GATED_ATTENTION = AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD), scale=True, output_gate=OutputGate.IN_QUERY)
_HYBRID_MOE = MoeParts(
    required=True,
    normalize=True,
    weight_scale=True,
    width_of_used=True,
    shared=True,
    shared_like_dense=True,
    shared_gate=True,
)

ARCHITECTURES = (
    # feed_forward_length counts the rows of gate and up together.
    Architecture(
        name="qwen",
        rope=RopeParts(RopeStyle.NEOX),
        ffn=FfnParts(width_divisor=2),
        biases=BiasParts(required=("attn_qkv",)),
    ),
    Architecture(name="qwen2", rope=RopeParts(RopeStyle.NEOX)),
    Architecture(
        name="qwen2moe",
        rope=RopeParts(RopeStyle.NEOX),
        moe=MoeParts(
            required=True,
            normalize=False,
            weight_scale=True,
            width_of_used=True,
            shared=True,
            shared_like_dense=True,
            shared_gate=True,
        ),
    ),
    Architecture(name="qwen2vl", rope=_SECTIONED),
    # The reranker variants have the rows of "yes" and "no" of the language-model head as cls.output.
    *(
        Architecture(
            name=name,
            rope=_SECTIONED,
            attention=HEAD_NORM,
            ffn=FfnParts(scales=True),
            rank=RankParts(softmax=True),
        )
        for name in ("qwen3", "qwen3vl")
    ),
    *(
        Architecture(
            name=name,
            rope=_SECTIONED,
            attention=HEAD_NORM,
            ffn=FfnParts(scales=True),
            moe=MoeParts(required=True, normalize=True, weight_scale=True, width_of_used=True),
        )
        for name in ("qwen3moe", "qwen3vlmoe")
    ),
    Architecture(
        name="qwen3next",
        layer=_HYBRID_LAYER,
        rope=RopeParts(RopeStyle.NEOX),
        attention=_GATED_ATTENTION,
        recurrent=RecurrentParts(Recurrence.DELTA_NET, Placement.LISTED, grouped_heads=True),
        ffn=FfnParts(scales=True),
        moe=_HYBRID_MOE,
        unused_scales=("attn_qkv", "attn_gate", "ssm_in", "ssm_ba", "ssm_out"),
        next_token_layers=True,
    ),
    *(
        Architecture(
            name=name,
            layer=_HYBRID_LAYER,
            rope=_SECTIONED,
            attention=_GATED_ATTENTION,
            recurrent=RecurrentParts(Recurrence.DELTA_NET, Placement.LISTED),
            ffn=FfnParts(scales=True),
            moe=moe,
            next_token_layers=True,
        )
        for name, moe in (("qwen35", None), ("qwen35moe", _HYBRID_MOE))
    ),
    Architecture(
        name="qwen4exp",
        layer=LayerParts(attn_norm=(), ffn_norm=(), skip=SkipKind.HYPER, ngrams=True),
        rope=_SECTIONED,
        attention=replace(_GATED_ATTENTION, indexer=IndexerParts(IndexerKind.POOLED)),
        recurrent=RecurrentParts(Recurrence.DELTA_NET, Placement.LISTED, sigmoid_gate=True),
        ffn=FfnParts(scales=True),
        moe=_HYBRID_MOE,
        head=HeadParts(norm=None),
        biases=BiasParts(unused=QKV),
        ignored_keys=("embedding_length_out",),  # of all streams
        ignored_tensors=("blk.*.indexer.*",),  # of layers without a ratio, which attend to all positions
    ),
)
