"""RWKV 6 and 7, and models of attention whose attention was exchanged for their time mixing (QRWKV6, ARWKV7)."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import LAYER_NORM
from engine.model.parts import (
    EmbeddingParts,
    FfnParts,
    LayerParts,
    NormParts,
    Placement,
    Presence,
    Recurrence,
    RecurrentParts,
)

_VERSION_6 = RecurrentParts(Recurrence.RWKV_6, Placement.ALL)
_VERSION_7 = RecurrentParts(Recurrence.RWKV_7, Placement.ALL)

ARCHITECTURES = (
    *(
        Architecture(
            name=name,
            embedding=EmbeddingParts(norm=True),
            norm=LAYER_NORM,
            layer=LayerParts(ffn_norm=("attn_norm_2",), rescaled=name == "rwkv6"),
            rope=None,
            attention=None,
            recurrent=recurrent,
            ffn=FfnParts(channel_mix=True),
        )
        for name, recurrent in (("rwkv6", _VERSION_6), ("rwkv7", _VERSION_7))
    ),
    *(
        Architecture(
            name=name,
            norm=NormParts(bias=Presence.OPTIONAL),
            rope=None,
            attention=None,
            recurrent=recurrent,
            ignored_keys=("rescale_every_n_layers",),
        )
        for name, recurrent in (("rwkv6qwen2", _VERSION_6), ("arwkv7", _VERSION_7))
    ),
)
