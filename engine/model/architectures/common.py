"""Parts that several families have in common; a family that differs in a field or two uses `dataclasses.replace`."""

from dataclasses import replace

from engine.model.config import NormKind, QkNorm, Routing
from engine.model.parts import AttentionParts, LayerParts, MoeParts, NormParts, Parallel, Presence, QkNormParts

LAYER_NORM = NormParts(NormKind.LAYER, bias=Presence.ALWAYS)

NORMS_ON_BOTH_SIDES = LayerParts(attn_post_norm=("post_attention_norm",), ffn_post_norm=("post_ffw_norm",))
SIDE_BY_SIDE = LayerParts(ffn_norm=("attn_norm",), parallel=Parallel.ALWAYS)
"""Attention and the feed-forward part read the same normalized input."""

HEAD_NORM = AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD))
HEAD_NORM_AFTER_ROPE = AttentionParts(qk_norm=QkNormParts(QkNorm.HEAD, after_rope=True))
QKV = ("attn_q", "attn_k", "attn_v")

SHARED_EXPERTS = MoeParts(
    required=True,
    normalize=None,
    weight_scale=True,
    dense_lead=True,
    groups=True,
    shared=True,
    shared_counted=True,
    selection_bias=True,
)
"""Dense layers, then many small experts in groups beside shared ones (DeepSeek 3; arXiv 2412.19437)."""
SHARED_EXPERTS_BY_SIGMOID = replace(SHARED_EXPERTS, routing=Routing.SIGMOID)
"""The same where files may leave out expert_gating_func."""

DENSE_PART = tuple(
    f"blk.*.{name}.{end}" for name in ("ffn_gate", "ffn_up", "ffn_down") for end in ("weight", "scale", "input_scale")
)
"""Tensors of a dense part, which layers with experts may have as well and which then takes no part."""

RECURRENT_LAYERS = ("attention.recurrent_layers",)
"""A key without effect where the layers' numbers of key heads show which of them recur."""
