"""The text sides of models that take pictures: PaddleOCR-VL, CogVLM and DeepSeek-OCR."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.parts import MoeParts, RopeParts

_EXPERTS_FOR_PICTURES = ("vis_attn_qkv", "vis_attn_output", "vis_gate", "vis_down", "vis_up")

ARCHITECTURES = (
    Architecture(name="paddleocr", rope=RopeParts(RopeStyle.NEOX, sections=RopeStyle.NEOX)),
    Architecture(
        name="cogvlm",
        rope=RopeParts(RopeStyle.NEOX),
        unused_scales=("attn_qkv",),
        ignored_tensors=tuple(f"blk.*.{name}.*" for name in _EXPERTS_FOR_PICTURES),
    ),
    # DeepSeek 2 without latent attention.
    Architecture(
        name="deepseek2-ocr",
        rope=RopeParts(RopeStyle.NEOX),
        moe=MoeParts(
            required=True,
            normalize=None,
            weight_scale=True,
            dense_lead=True,
            groups=True,
            shared=True,
            shared_counted=True,
            selection_bias=True,
        ),
    ),
)
