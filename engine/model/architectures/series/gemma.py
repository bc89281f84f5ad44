"""Gemma 1 to 4: token vectors scaled by sqrt(D), later with norms on both sides of every part, caps and windows.

Gemma 3n has a residual stream of several vectors; it and the small models of Gemma 4 give every layer a vector of each
token, and their last layers read the caches of earlier ones.
"""

from dataclasses import replace

from engine.model.architecture import Architecture
from engine.model.architectures.common import NORMS_ON_BOTH_SIDES
from engine.model.config import Activation, QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    EmbeddingParts,
    FfnParts,
    HeadParts,
    MoeParts,
    NormParts,
    QkNormParts,
    RopeParts,
    WindowParts,
)

ARCHITECTURES = (
    Architecture(
        name="gemma",
        embedding=EmbeddingParts(sqrt_width=True),
        rope=RopeParts(RopeStyle.NEOX),
        ffn=FfnParts(Activation.GELU),
    ),
    Architecture(
        name="gemma2",
        embedding=EmbeddingParts(sqrt_width=True),
        layer=NORMS_ON_BOTH_SIDES,
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(
            window=WindowParts(period=2, default=4096),
            softcap=50.0,
            scale=True,
            scale_by_width=frozenset({46}),  # the 27B model
        ),
        ffn=FfnParts(Activation.GELU),
        head=HeadParts(softcap=30.0),
    ),
    # Files of Ollama's converter leave out the base and the epsilon, which all models have in common.
    Architecture(
        name="gemma3",
        embedding=EmbeddingParts(sqrt_width=True),
        norm=NormParts(epsilon=1e-6),
        layer=NORMS_ON_BOTH_SIDES,
        rope=RopeParts(RopeStyle.NEOX, base=1000000.0),
        attention=AttentionParts(
            qk_norm=QkNormParts(QkNorm.HEAD),
            window=WindowParts(period=6, base=10000.0, unscaled=True),
            scale=True,
            scale_by_width=frozenset({62}),  # the 27B model
        ),
        ffn=FfnParts(Activation.GELU),
        head=HeadParts(softcap=0.0),
    ),
    # Layers beyond the twentieth read the caches of earlier ones; files may leave that out, and which gates are sparse.
    Architecture(
        name="gemma3n",
        embedding=EmbeddingParts(sqrt_width=True, per_layer=256),
        layer=replace(NORMS_ON_BOTH_SIDES, streams=4, laurel=True),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(
            qk_norm=QkNormParts(QkNorm.HEAD),
            window=WindowParts(period=5, base=10000.0, unscaled=True),
            fixed_scale=1.0,
            value_norm=True,
            shared_caches=True,
            own_caches=20,
        ),
        ffn=FfnParts(Activation.GELU, sparse_layers=10),
        head=HeadParts(softcap=30.0),
    ),
    # rope_freqs keeps a part of the heads of full layers from being rotated.
    Architecture(
        name="gemma4",
        embedding=EmbeddingParts(sqrt_width=True, per_layer=0),
        layer=replace(NORMS_ON_BOTH_SIDES, output_scale=True),
        rope=RopeParts(RopeStyle.NEOX, divisors=True),
        attention=AttentionParts(
            qk_norm=QkNormParts(QkNorm.HEAD),
            window=WindowParts(base=10000.0, unscaled=True, undivided=True, head_widths=True, own_width=True),
            fixed_scale=1.0,
            value_norm=True,
            values_like_keys=True,
            shared_caches=True,
        ),
        ffn=FfnParts(Activation.GELU, scales=True),
        moe=MoeParts(dense_without_router=True, shared=True, shared_named_dense=True, separate_norms=True),
        head=HeadParts(softcap=0.0),
        unused_scales=("ffn_gate_inp",),  # a vector, which is a norm's weight
    ),
)
