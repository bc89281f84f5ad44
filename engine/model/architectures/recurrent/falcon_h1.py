"""Falcon-H1: attention and Mamba 2 read the same input."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.parts import AttentionParts, BiasParts, Placement, Recurrence, RecurrentParts, RopeParts

# Which layers recur shows in their numbers of key heads.
_RECURRENT_LAYERS = ("attention.recurrent_layers",)

ARCHITECTURES = (
    Architecture(
        name="falcon-h1",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(scale=True),
        recurrent=RecurrentParts(Recurrence.MAMBA_2, Placement.BESIDE_ATTENTION),
        biases=BiasParts(unused=("attn_output",)),
        ignored_keys=_RECURRENT_LAYERS,
        ignored_tensors=("rope_freqs.weight",),
    ),
)
