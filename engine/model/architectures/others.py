"""Families that are Llama with one or two parts exchanged."""

from engine.model.architecture import Architecture
from engine.model.config import Activation, NormKind, OutputGate, QkNorm, QkWeights, RopeStyle, Routing, SkipKind
from engine.model.parts import (
    AttentionParts,
    BiasParts,
    EmbeddingParts,
    FfnParts,
    HeadParts,
    LayerParts,
    LogitScale,
    MoeParts,
    NormParts,
    Parallel,
    Presence,
    QkNormParts,
    RopeParts,
    WindowParts,
)

_OF_A_MATRIX = ("weight", "scale", "input_scale")
_LAYER_NORM = NormParts(NormKind.LAYER, bias=Presence.ALWAYS)
_NORM_AFTER_ROPE = AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD, after_rope=True))

ARCHITECTURES = (
    Architecture(name="internlm2", rope=RopeParts(RopeStyle.NORM)),
    Architecture(
        name="grovemoe",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD)),
        moe=MoeParts(required=True, groups=True, width_of_used=True, adjugates=True),
    ),
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
    Architecture(
        name="maincoder",
        rope=RopeParts(RopeStyle.NORM),
        attention=_NORM_AFTER_ROPE,
    ),
    Architecture(
        name="pangu-embedded",
        rope=RopeParts(RopeStyle.NEOX),
        biases=BiasParts(required=("attn_output",)),
        ignored_tensors=("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"),
    ),
    Architecture(name="xverse", rope=RopeParts(RopeStyle.NORM)),
    # The model of 32 layers rotates, that of 40 has linear biases instead.
    Architecture(
        name="baichuan",
        rope=RopeParts(RopeStyle.NORM, n_layers=32),
        attention=AttentionParts(alibi=8.0, alibi_layers=40),
    ),
    Architecture(name="orion", norm=_LAYER_NORM, rope=RopeParts(RopeStyle.NEOX)),
    Architecture(
        name="arcee",
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        ffn=FfnParts(Activation.RELU_SQUARED, gated=False),
    ),
    Architecture(
        name="ernie4_5",
        rope=RopeParts(RopeStyle.NORM, sections=RopeStyle.NORM),
        biases=BiasParts(unused=("attn_output",)),
    ),
    Architecture(
        name="ernie4_5-moe",
        rope=RopeParts(RopeStyle.NORM, sections=RopeStyle.NORM),
        moe=MoeParts(required=True, dense_lead=True, interleaved=True, shared=True, selection_bias=True),
        biases=BiasParts(unused=("attn_output",)),
    ),
    Architecture(name="smollm3", rope=RopeParts(RopeStyle.NORM, skip_every=4)),
    Architecture(
        name="seed_oss",
        layer=LayerParts(ffn_norm=("post_attention_norm",)),
        rope=RopeParts(RopeStyle.NEOX),
    ),
    *(
        Architecture(
            name=name,
            rope=RopeParts(RopeStyle.NEOX, sections=RopeStyle.NEOX),
            attention=_NORM_AFTER_ROPE,
        )
        for name in ("hunyuan-dense", "hunyuan_vl")
    ),
    Architecture(
        name="hunyuan-moe",
        rope=RopeParts(RopeStyle.NEOX),
        attention=_NORM_AFTER_ROPE,
        moe=MoeParts(required=True, shared=True),
    ),
    # Layers with experts may have a dense part as well, which takes no part.
    Architecture(
        name="hy_v3",
        rope=RopeParts(RopeStyle.NEOX, divisors=True),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD)),
        ffn=FfnParts(scales=True),
        moe=MoeParts(
            required=True,
            routing=Routing.SIGMOID,
            normalize=None,
            weight_scale=True,
            dense_without_router=True,
            groups=True,
            width_of_used=True,
            shared=True,
            selection_bias=True,
        ),
        next_token_layers=True,
        ignored_tensors=tuple(
            f"blk.*.{name}.{end}" for name in ("ffn_gate", "ffn_up", "ffn_down") for end in _OF_A_MATRIX
        ),
    ),
    Architecture(
        name="plamo3",
        layer=LayerParts(attn_post_norm=("post_attention_norm",), ffn_post_norm=("post_ffw_norm",)),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD), window=WindowParts(period=8)),
        ffn=FfnParts(fused_gate=Presence.ALWAYS),
        unused_scales=("attn_qkv",),
    ),
    Architecture(
        name="dbrx",
        norm=NormParts(NormKind.LAYER),
        layer=LayerParts(ffn_norm=("attn_output_norm",)),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(clamp=True),
        moe=MoeParts(required=True, weight_scale=True),
    ),
    Architecture(
        name="nemotron",
        norm=_LAYER_NORM,
        rope=RopeParts(RopeStyle.NEOX),
        ffn=FfnParts(Activation.RELU_SQUARED, gated=False),
    ),
    Architecture(
        name="stablelm",
        norm=_LAYER_NORM,
        layer=LayerParts(ffn_norm=("ffn_norm", "attn_norm"), parallel=Parallel.WITHOUT_NORM),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.EACH_HEAD, presence=Presence.OPTIONAL)),
    ),
)
