"""Nemotron-H: each layer is attention, Mamba 2 or a feed-forward part alone."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import RECURRENT_LAYERS
from engine.model.config import Activation, Routing
from engine.model.parts import (
    AttentionParts,
    FfnParts,
    LayerParts,
    MoeParts,
    NormParts,
    Placement,
    Recurrence,
    RecurrentParts,
)

ARCHITECTURES = (
    *(
        Architecture(
            name=name,
            norm=NormParts(either_epsilon=True),
            layer=LayerParts(ffn_norm=("attn_norm",), one_part=True),
            rope=None,
            attention=AttentionParts(scale=True),
            recurrent=RecurrentParts(Recurrence.MAMBA_2, Placement.WITHOUT_KEYS),
            ffn=FfnParts(Activation.RELU_SQUARED, gated=False, scales=True),
            moe=MoeParts(
                normalize=None,
                weight_scale=True,
                dense_without_router=True,
                routing=Routing.SIGMOID,
                shared=True,
                selection_bias=True,
            ),
            next_token_layers=True,
            ignored_keys=RECURRENT_LAYERS,
        )
        for name in ("nemotron_h", "nemotron_h_moe")
    ),
)
