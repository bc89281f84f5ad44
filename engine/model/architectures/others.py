"""Families that are Llama with one or two parts exchanged."""

from engine.model.architecture import Architecture, MoeParts, Parallel, Presence
from engine.model.config import Activation, NormKind, QkNorm, RopeStyle

ARCHITECTURES = (
    Architecture(name="internlm2", rope=RopeStyle.NORM),
    Architecture(name="xverse", rope=RopeStyle.NORM),
    Architecture(name="orion", rope=RopeStyle.NEOX, norm=NormKind.LAYER, norm_bias=Presence.ALWAYS),
    Architecture(name="arcee", rope=RopeStyle.NORM, rope_freqs=True, activation=Activation.RELU_SQUARED, gated=False),
    Architecture(name="ernie4_5", rope=RopeStyle.NORM, rope_sections=RopeStyle.NORM, unused_biases=("attn_output",)),
    Architecture(
        name="ernie4_5-moe",
        rope=RopeStyle.NORM,
        rope_sections=RopeStyle.NORM,
        unused_biases=("attn_output",),
        moe=MoeParts(required=True, dense_lead=True, interleaved=True, shared=True, selection_bias=True),
    ),
    Architecture(name="smollm3", rope=RopeStyle.NORM, no_rope_every=4),
    Architecture(name="seed_oss", rope=RopeStyle.NEOX, ffn_norm=("post_attention_norm",)),
    Architecture(
        name="hunyuan-dense",
        rope=RopeStyle.NEOX,
        rope_sections=RopeStyle.NEOX,
        qk_norm=QkNorm.HEAD,
        qk_norm_after_rope=True,
    ),
    Architecture(
        name="hunyuan-moe",
        rope=RopeStyle.NEOX,
        qk_norm=QkNorm.HEAD,
        qk_norm_after_rope=True,
        moe=MoeParts(required=True, shared=True),
    ),
    Architecture(
        name="nemotron",
        rope=RopeStyle.NEOX,
        norm=NormKind.LAYER,
        norm_bias=Presence.ALWAYS,
        activation=Activation.RELU_SQUARED,
        gated=False,
    ),
    Architecture(
        name="stablelm",
        rope=RopeStyle.NEOX,
        norm=NormKind.LAYER,
        norm_bias=Presence.ALWAYS,
        ffn_norm=("ffn_norm", "attn_norm"),
        parallel=Parallel.WITHOUT_NORM,
        qk_norm=QkNorm.EACH_HEAD,
        qk_norm_presence=Presence.OPTIONAL,
    ),
)
