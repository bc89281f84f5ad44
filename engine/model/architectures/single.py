"""Families with one part that no other has: Apertus, BitNet, PLM and Step 3.5."""

from engine.model.architecture import Architecture
from engine.model.config import Activation, OutputGate, QkNorm, RopeStyle, Routing
from engine.model.parts import (
    AttentionParts,
    FfnParts,
    MoeParts,
    Presence,
    QkNormParts,
    RopeParts,
    WindowParts,
)

ARCHITECTURES = (
    Architecture(
        name="apertus",
        rope=RopeParts(RopeStyle.NEOX, divisors=True, long_factors=True),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD), scale=True),
        ffn=FfnParts(Activation.XIELU, gated=False),
    ),
    # Weights of one of three values are in files as such, or as other types; scales of old files are whole tensors.
    Architecture(
        name="bitnet",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(sub_norm=True),
        ffn=FfnParts(scales=True, sub_norm=True),
    ),
    Architecture(
        name="plm",
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(latent=True),
        ffn=FfnParts(Activation.RELU_SQUARED, gated=False),
    ),
    # Full layers rotate half of what windowed ones do.
    Architecture(
        name="step35",
        rope=RopeParts(RopeStyle.NEOX, divisors=True, long_factors=True, halved=True),
        attention=AttentionParts(
            qk_norm=QkNormParts(QkNorm.HEAD, presence=Presence.OPTIONAL),
            window=WindowParts(base=10000.0, unscaled=True, undivided=True, own_width=True),
            output_gate=OutputGate.OWN,
        ),
        ffn=FfnParts(limits=True),
        moe=MoeParts(
            routing=Routing.SIGMOID,
            normalize=None,
            weight_scale=True,
            dense_without_router=True,
            shared=True,
            selection_bias=True,
        ),
        next_token_layers=True,
    ),
)
