"""LFM2, dense and mixture of experts: gated short convolutions and attention. The last norm is token_embd_norm."""

from engine.model.architecture import Architecture
from engine.model.architectures.common import HEAD_NORM, RECURRENT_LAYERS
from engine.model.config import QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    HeadParts,
    MoeParts,
    Placement,
    QkNormParts,
    Recurrence,
    RecurrentParts,
    RopeParts,
    WindowParts,
)

_CONVOLUTIONS = RecurrentParts(Recurrence.SHORT_CONVOLUTION, Placement.WITHOUT_KEYS)
_HEAD = HeadParts(norm="token_embd_norm")

ARCHITECTURES = (
    Architecture(
        name="lfm2",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD), window=WindowParts(period=0)),
        recurrent=_CONVOLUTIONS,
        head=_HEAD,
        # No layer has experts.
        ignored_keys=(*RECURRENT_LAYERS, "leading_dense_block_count"),
        ignored_tensors=("dense_2.weight", "dense_2.bias"),
    ),
    Architecture(
        name="lfm2moe",
        rope=RopeParts(RopeStyle.NEOX),
        attention=HEAD_NORM,
        recurrent=_CONVOLUTIONS,
        moe=MoeParts(required=True, normalize=True, weight_scale=True, dense_lead=True, selection_bias=True),
        head=_HEAD,
        ignored_keys=RECURRENT_LAYERS,
    ),
)
