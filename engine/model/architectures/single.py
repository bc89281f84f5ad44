"""Families with one part that no other has: Apertus, BitNet, HRM-Text, PLM and Step 3.5."""

from engine.model.architecture import Architecture
from engine.model.config import Activation, OutputGate, QkNorm, RopeStyle, Routing
from engine.model.parts import (
    AttentionParts,
    EmbeddingParts,
    FfnParts,
    LayerParts,
    MoeParts,
    NormParts,
    Presence,
    QkNormParts,
    RopeParts,
    WindowParts,
)
from engine.model.skip_config import SkipKind

ARCHITECTURES = (
    # Prompts are read causally, as llama.cpp reads them, also where the model was trained to see all of them at once.
    Architecture(
        name="hrm_text",
        embedding=EmbeddingParts(scale=0.0),
        norm=NormParts(weight=False),
        layer=LayerParts(skip=SkipKind.CYCLED),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(output_gate=OutputGate.OWN),
        ignored_keys=("hrm.prefix_lm",),
    ),
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
