"""Arctic: experts that read the layer's input, beside attention and a small dense part."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.parts import MoeParts, RopeParts

ARCHITECTURES = (
    # Experts that read the layer's input run beside attention and a small dense part.
    Architecture(
        name="arctic",
        rope=RopeParts(RopeStyle.NORM),
        moe=MoeParts(required=True, groups=True, shared=True, shared_named_dense=True, reads_input=True),
    ),
)
