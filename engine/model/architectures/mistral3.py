"""Mistral 3 and Ministral 3: Llama with YaRN and queries sharpened beyond the original context."""

from engine.model.architecture import Architecture, MoeParts, WindowParts
from engine.model.config import RopeStyle

ARCHITECTURES = (
    Architecture(
        name="mistral3",
        rope=RopeStyle.NORM,
        moe=MoeParts(normalize=True, weight_scale=True),
        window=WindowParts(period=0),
        temperature=True,
        rope_freqs=True,
        ffn_scale=True,
    ),
)
