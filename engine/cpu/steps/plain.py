"""Which parts of a layer compiled steps compute whole; the others are left to CpuOps."""

from __future__ import annotations

from engine.config import PAGE
from engine.cpu.products.matmul import LANES
from engine.cpu.steps.recurrent_steps import fits_delta_net, fits_mamba, fits_mamba_2, fits_short_conv
from engine.model.config import (
    AttentionConfig,
    DeltaNetConfig,
    FfnConfig,
    GateFunction,
    Mamba2Config,
    MambaConfig,
    OutputGate,
    ShortConvConfig,
)
from engine.model.weights import LayerWeights


def plain_layer(layer: LayerWeights) -> bool:
    """Whether kernels compute all of a layer."""
    beside = layer.laurel, layer.layer_input, layer.streams, layer.ngrams
    if any(part is not None for part in beside) or layer.output_scale != 1.0:
        return False
    recurrent, attends = layer.config.recurrent_part is not None, layer.config.attention_part is not None
    mixes = (not recurrent or plain_recurrent(layer)) and (not attends or plain_attention(layer))
    return layer.mixer_skip is None and layer.channel_mix is None and mixes and plain_ffn(layer)


def plain_recurrent(layer: LayerWeights) -> bool:
    """Whether a layer has a recurrent mixer, perhaps beside attention, and kernels compute all of it."""
    config = layer.config.recurrent_part
    if isinstance(config, ShortConvConfig):
        return fits_short_conv(config)
    if isinstance(config, MambaConfig):
        return fits_mamba(config)
    if isinstance(config, Mamba2Config):
        return fits_mamba_2(config)
    return isinstance(config, DeltaNetConfig) and fits_delta_net(config)


def plain_attention(layer: LayerWeights) -> bool:
    """Whether a layer has attention, and kernels compute all of it, from its products to its output."""
    config = layer.config.attention_part
    if config is None:
        return False
    plain = config.plain and config.clamp is None and plain_output_gate(config)
    return plain and config.chunk is None and can_attend(layer)


def plain_output_gate(config: AttentionConfig) -> bool:
    """Whether kernels compute what gates the output of attention, if anything does."""
    if config.output_gate is None:
        return True
    whole = config.output_gate is OutputGate.IN_QUERY and config.value_width == config.key_width
    return whole and config.gate_function is GateFunction.SIGMOID and config.key_width % LANES == 0


def plain_ffn(layer: LayerWeights) -> bool:
    """Whether kernels compute all of a layer's feed-forward part, if it has one, and the layer ends with it."""
    config = layer.config
    plain = config.ffn is None or (isinstance(config.ffn, FfnConfig) and plain_gate(config.ffn))
    return plain and not config.embedding_skip and not config.closing_norm


def plain_gate(ffn: FfnConfig) -> bool:
    """Whether kernels compute a part's activation."""
    return ffn.limit is None and ffn.caps is None and ffn.xielu is None and not ffn.sparsity


def can_attend(layer: LayerWeights) -> bool:
    """Whether the attention kernel serves a layer.

    It has no softcap together with linear biases, no learned biases, and no chunks of positions but whole pages.
    """
    config = layer.config.attention
    plain = (config.softcap is None or not config.alibi) and not config.relative_buckets
    return plain and (config.chunk is None or config.chunk % PAGE == 0)
