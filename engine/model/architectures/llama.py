"""Llama 1-3, Mistral 7B, Mixtral and the many families whose files call themselves "llama"."""

from engine.model.architecture import Architecture, MoeParts, WindowParts
from engine.model.config import RopeStyle

ARCHITECTURES = (
    Architecture(
        name="llama",
        rope=RopeStyle.NORM,
        moe=MoeParts(normalize=True, weight_scale=True),
        window=WindowParts(period=0),
        rope_freqs=True,
        ffn_scale=True,
    ),
)
