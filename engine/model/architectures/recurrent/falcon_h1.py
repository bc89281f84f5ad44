"""Falcon-H1: attention and Mamba 2 read the same input."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import RECURRENT_LAYERS
from engine.model.config import RopeStyle
from engine.model.parts import AttentionParts, BiasParts, Placement, Recurrence, RecurrentParts, RopeParts

ARCHITECTURES = (
    Architecture(
        name="falcon-h1",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(scale=True),
        recurrent=RecurrentParts(Recurrence.MAMBA_2, Placement.BESIDE_ATTENTION),
        biases=BiasParts(unused=("attn_output",)),
        ignored_keys=RECURRENT_LAYERS,
        ignored_tensors=("rope_freqs.weight",),
    ),
)
