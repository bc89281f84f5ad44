"""Jamba: attention in few layers, Mamba 1 in the others, experts in some."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import RECURRENT_LAYERS
from engine.model.parts import MoeParts, Placement, Recurrence, RecurrentParts

ARCHITECTURES = (
    Architecture(
        name="jamba",
        rope=None,
        recurrent=RecurrentParts(Recurrence.MAMBA, Placement.WITHOUT_KEYS, norm_weights=True),
        moe=MoeParts(normalize=False, weight_scale=True, dense_without_router=True),
        ignored_keys=RECURRENT_LAYERS,
    ),
)
