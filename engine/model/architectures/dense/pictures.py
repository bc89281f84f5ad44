"""The text sides of models that take or make pictures: PaddleOCR-VL, CogVLM and Chameleon."""

from engine.model.architecture import Architecture
from engine.model.config import NormKind, QkNorm, RopeStyle
from engine.model.parts import AttentionParts, HeadParts, LayerParts, NormParts, Presence, QkNormParts, RopeParts

_EXPERTS_FOR_PICTURES = ("vis_attn_qkv", "vis_attn_output", "vis_gate", "vis_down", "vis_up")

ARCHITECTURES = (
    Architecture(name="paddleocr", rope=RopeParts(RopeStyle.NEOX, sections=RopeStyle.NEOX)),
    Architecture(
        name="cogvlm",
        rope=RopeParts(RopeStyle.NEOX),
        unused_scales=("attn_qkv",),
        ignored_tensors=tuple(f"blk.*.{name}.*" for name in _EXPERTS_FOR_PICTURES),
    ),
    # Tokens 4 to 8195 are pieces of pictures.
    Architecture(
        name="chameleon",
        norm=NormParts(bias=Presence.OPTIONAL),
        layer=LayerParts(behind_stated=True),
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(qk_norm=QkNormParts(QkNorm.EACH_HEAD, norm=NormKind.LAYER, epsilon=1e-5)),
        head=HeadParts(silent=(4, 8196)),
    ),
)
