"""Mistral 3 and Ministral 3: Llama with YaRN and queries sharpened beyond the original context."""

from engine.model.architecture import Architecture, MoeParts
from engine.model.config import RopeStyle

ARCHITECTURES = (
    Architecture(
        name="mistral3",
        rope=RopeStyle.NORM,
        moe=MoeParts(normalize=True, weight_scale=True),
        sliding_window=True,
        temperature=True,
        rope_freqs=True,
    ),
)
