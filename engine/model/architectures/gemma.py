"""Gemma 1, 2 and 3: token vectors scaled by sqrt(D), later with norms on both sides of every part, caps and windows."""

from engine.model.architecture import Architecture, WindowParts
from engine.model.config import Activation, QkNorm, RopeStyle

ARCHITECTURES = (
    Architecture(
        name="gemma",
        rope=RopeStyle.NEOX,
        activation=Activation.GELU,
        embedding_sqrt_width=True,
    ),
    Architecture(
        name="gemma2",
        rope=RopeStyle.NEOX,
        activation=Activation.GELU,
        embedding_sqrt_width=True,
        attn_post_norm=("post_attention_norm",),
        ffn_post_norm=("post_ffw_norm",),
        window=WindowParts(period=2, default=4096),
        attn_softcap=50.0,
        logit_softcap=30.0,
        attention_scale=True,
        scale_by_width=frozenset({46}),  # the 27B model
    ),
    # Files of Ollama's converter leave out the base and the epsilon, which all models have in common.
    Architecture(
        name="gemma3",
        rope=RopeStyle.NEOX,
        rope_base=1000000.0,
        norm_epsilon=1e-6,
        activation=Activation.GELU,
        embedding_sqrt_width=True,
        attn_post_norm=("post_attention_norm",),
        ffn_post_norm=("post_ffw_norm",),
        qk_norm=QkNorm.HEAD,
        window=WindowParts(period=6, base=10000.0, unscaled=True),
        logit_softcap=0.0,
        attention_scale=True,
        scale_by_width=frozenset({62}),  # the 27B model
    ),
)
