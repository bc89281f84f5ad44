"""BitNet: weights of three values, and norms inside of attention and feed-forward parts."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.parts import AttentionParts, FfnParts, RopeParts

ARCHITECTURES = (
    # Weights of one of three values are in files as such, or as other types; scales of old files are whole tensors.
    Architecture(
        name="bitnet",
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(sub_norm=True),
        ffn=FfnParts(scales=True, sub_norm=True),
    ),
)
