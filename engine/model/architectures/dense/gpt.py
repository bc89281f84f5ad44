"""GPT-2 and its relatives with LayerNorm and no gate: GPT-J, GPT-NeoX, BLOOM, MPT, StarCoder, CodeShell."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import LAYER_NORM, SIDE_BY_SIDE
from engine.model.config import Activation, NormKind, QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    BiasParts,
    EmbeddingParts,
    FfnParts,
    LayerParts,
    NormParts,
    Parallel,
    Presence,
    QkNormParts,
    RopeParts,
)

_FFN = FfnParts(Activation.GELU, gated=False)
_BIASES = BiasParts(required=("attn_qkv", "attn_output", "ffn_up", "ffn_down"))

ARCHITECTURES = (
    *(
        Architecture(
            name=name,
            embedding=EmbeddingParts(positions=Presence.ALWAYS),
            norm=LAYER_NORM,
            rope=None,
            ffn=_FFN,
            biases=_BIASES,
        )
        for name in ("gpt2", "starcoder")
    ),
    Architecture(
        name="codeshell",
        norm=LAYER_NORM,
        rope=RopeParts(RopeStyle.NEOX),
        ffn=_FFN,
        biases=_BIASES,
    ),
    # llama.cpp has the name and the tensors' names, and does not run it.
    Architecture(
        name="gptj",
        norm=LAYER_NORM,
        layer=SIDE_BY_SIDE,
        rope=RopeParts(RopeStyle.NORM),
        ffn=_FFN,
        biases=BiasParts(required=("ffn_up", "ffn_down")),
    ),
    Architecture(
        name="gptneox",
        norm=LAYER_NORM,
        layer=LayerParts(parallel=Parallel.STATED),
        rope=RopeParts(RopeStyle.NEOX),
        ffn=_FFN,
        biases=_BIASES,
    ),
    Architecture(
        name="bloom",
        embedding=EmbeddingParts(norm=True),
        norm=LAYER_NORM,
        rope=None,
        attention=AttentionParts(alibi=8.0),
        ffn=_FFN,
        biases=_BIASES,
    ),
    # A norm of keys alone (as some converted files have it) takes no part.
    Architecture(
        name="mpt",
        embedding=EmbeddingParts(positions=Presence.OPTIONAL),
        norm=NormParts(NormKind.LAYER, bias=Presence.OPTIONAL),
        rope=None,
        attention=AttentionParts(
            qk_norm=QkNormParts(QkNorm.WIDTH, presence=Presence.OPTIONAL),
            alibi=0.0,
            clamp=True,
        ),
        ffn=FfnParts(Activation.GELU, gated=False, act_scales=True),
        ignored_tensors=("blk.*.attn_k_norm.weight", "blk.*.attn_k_norm.bias"),
    ),
    Architecture(
        name="starcoder2",
        norm=LAYER_NORM,
        rope=RopeParts(RopeStyle.NEOX),
        ffn=_FFN,
        biases=BiasParts(required=("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")),
    ),
)
