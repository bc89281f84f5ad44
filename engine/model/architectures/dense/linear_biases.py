"""Llama with linear biases in place of a rotation: Refact, and Baichuan's larger model."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.parts import AttentionParts, BiasParts, RopeParts

ARCHITECTURES = (
    # Files may hold biases and factors of rotation that take no part.
    Architecture(
        name="refact",
        rope=None,
        attention=AttentionParts(alibi=8.0),
        biases=BiasParts(unused=("attn_output", "ffn_gate", "ffn_up", "ffn_down")),
        ignored_tensors=("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"),
    ),
    # The model of 32 layers rotates, that of 40 has linear biases instead.
    Architecture(
        name="baichuan",
        rope=RopeParts(RopeStyle.NORM, n_layers=32),
        attention=AttentionParts(alibi=8.0, alibi_layers=40),
    ),
)
