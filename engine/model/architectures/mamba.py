"""Mamba 1 and Falcon Mamba: selective state spaces, no attention and no feed-forward parts."""

from engine.model.architecture import Architecture
from engine.model.parts import LayerParts, MambaParts

ARCHITECTURES = (
    Architecture(
        name="mamba",
        layer=LayerParts(ffn_norm=()),
        rope=None,
        attention=None,
        recurrent=MambaParts(),
        ffn=None,
        ignored_keys=("attention.head_count", "attention.head_count_kv", "attention.recurrent_layers"),
    ),
)
