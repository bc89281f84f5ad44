"""Mamba 1 and 2: selective state spaces, no attention and no feed-forward parts."""

from engine.model.architecture import Architecture
from engine.model.parts import LayerParts, Placement, Recurrence, RecurrentParts

_NO_ATTENTION = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.recurrent_layers",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "rope.dimension_count_swa",
)

ARCHITECTURES = tuple(
    Architecture(
        name=name,
        layer=LayerParts(ffn_norm=()),
        rope=None,
        attention=None,
        recurrent=RecurrentParts(kind, Placement.ALL),
        ffn=None,
        ignored_keys=_NO_ATTENTION,
    )
    for name, kind in (("mamba", Recurrence.MAMBA), ("mamba2", Recurrence.MAMBA_2))
)
