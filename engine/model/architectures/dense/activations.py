"""Feed-forward parts without a gate, with another activation: Arcee, Apertus, and PLM, whose attention is latent."""

from engine.model.architecture import Architecture
from engine.model.config import Activation, QkNorm, RopeStyle
from engine.model.parts import AttentionParts, FfnParts, QkNormParts, RopeParts

ARCHITECTURES = (
    Architecture(
        name="arcee",
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        ffn=FfnParts(Activation.RELU_SQUARED, gated=False),
    ),
    Architecture(
        name="apertus",
        rope=RopeParts(RopeStyle.NEOX, divisors=True, long_factors=True),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD), scale=True),
        ffn=FfnParts(Activation.XIELU, gated=False),
    ),
    Architecture(
        name="plm",
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(latent=True),
        ffn=FfnParts(Activation.RELU_SQUARED, gated=False),
    ),
)
