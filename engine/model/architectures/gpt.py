"""GPT-2 and its relatives with LayerNorm and no gate: GPT-NeoX, BLOOM, MPT, StarCoder, CodeShell."""

from engine.model.architecture import Architecture, Parallel, Presence
from engine.model.config import Activation, NormKind, QkNorm, RopeStyle

_ALL_BIASES = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")

ARCHITECTURES = (
    *(
        Architecture(
            name=name,
            rope=None,
            norm=NormKind.LAYER,
            norm_bias=Presence.ALWAYS,
            position_embd=Presence.ALWAYS,
            biases=_ALL_BIASES,
            activation=Activation.GELU,
            gated=False,
        )
        for name in ("gpt2", "starcoder")
    ),
    Architecture(
        name="codeshell",
        rope=RopeStyle.NEOX,
        norm=NormKind.LAYER,
        norm_bias=Presence.ALWAYS,
        biases=_ALL_BIASES,
        activation=Activation.GELU,
        gated=False,
    ),
    Architecture(
        name="gptneox",
        rope=RopeStyle.NEOX,
        norm=NormKind.LAYER,
        norm_bias=Presence.ALWAYS,
        parallel=Parallel.STATED,
        biases=_ALL_BIASES,
        activation=Activation.GELU,
        gated=False,
    ),
    Architecture(
        name="bloom",
        rope=None,
        norm=NormKind.LAYER,
        norm_bias=Presence.ALWAYS,
        embedding_norm=True,
        alibi=8.0,
        biases=_ALL_BIASES,
        activation=Activation.GELU,
        gated=False,
    ),
    # A norm of keys alone (as some converted files have it) takes no part.
    Architecture(
        name="mpt",
        rope=None,
        norm=NormKind.LAYER,
        norm_bias=Presence.OPTIONAL,
        position_embd=Presence.OPTIONAL,
        alibi=0.0,
        clamp=True,
        qk_norm=QkNorm.WIDTH,
        qk_norm_presence=Presence.OPTIONAL,
        activation=Activation.GELU,
        gated=False,
        act_scales=True,
        ignored_tensors=("blk.*.attn_k_norm.weight", "blk.*.attn_k_norm.bias"),
    ),
    Architecture(
        name="starcoder2",
        rope=RopeStyle.NEOX,
        norm=NormKind.LAYER,
        norm_bias=Presence.ALWAYS,
        biases=("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"),
        activation=Activation.GELU,
        gated=False,
    ),
)
