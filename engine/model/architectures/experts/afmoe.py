"""Gated attention with windows in most layers: AFMoE (Trinity) and Laguna with experts, Muse Glimmer and Spark 2.5."""

from dataclasses import replace

from engine.model.architecture import Architecture
from engine.model.architectures.common import NORMS_ON_BOTH_SIDES, SHARED_EXPERTS_BY_SIGMOID
from engine.model.config import Activation, GateFunction, OutputGate, QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    EmbeddingParts,
    FfnParts,
    HeadParts,
    LogitScale,
    QkNormParts,
    RopeParts,
    WindowParts,
)

_HEAD_NORM = QkNormParts(QkNorm.HEAD)

ARCHITECTURES = (
    Architecture(
        name="afmoe",
        embedding=EmbeddingParts(sqrt_width=True),
        layer=NORMS_ON_BOTH_SIDES,
        rope=RopeParts(RopeStyle.NEOX, skip_every=4),
        attention=AttentionParts(qk_norm=_HEAD_NORM, window=WindowParts(period=4), output_gate=OutputGate.OWN),
        moe=SHARED_EXPERTS_BY_SIGMOID,
        unused_scales=("attn_gate",),
    ),
    # Layers without a window rotate fewer elements, with YaRN.
    Architecture(
        name="laguna",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(
            qk_norm=_HEAD_NORM,
            window=WindowParts(period=4, full_first=True, unscaled=True, own_width=True),
            output_gate=OutputGate.OWN,
            gate_function=GateFunction.SOFTPLUS,
        ),
        moe=replace(SHARED_EXPERTS_BY_SIGMOID, shared_least=1),
        unused_scales=("attn_gate",),
    ),
    Architecture(
        name="muse-glimmer",
        embedding=EmbeddingParts(bare_norm=True),
        layer=replace(NORMS_ON_BOTH_SIDES, post_epsilon=1e-8),
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(
            qk_norm=_HEAD_NORM, window=WindowParts(period=4, rotated_only=True), output_gate=OutputGate.OWN
        ),
        head=HeadParts(scale=LogitScale.MULTIPLIES, softcap=0.0),
        unused_scales=("attn_gate",),
    ),
    Architecture(
        name="spark2_5",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(window=WindowParts(own_width=True), output_gate=OutputGate.PER_HEAD),
        ffn=FfnParts(Activation.GELU),
        unused_scales=("attn_gate",),
    ),
)
