"""Which parts of a layer compiled steps compute whole; the others are left to CpuOps."""

from __future__ import annotations

from engine.config import PAGE
from engine.cpu.products.matmul import LANES
from engine.cpu.steps.recurrent_steps import fits_delta_net, fits_short_conv
from engine.model.config import AttentionConfig, DeltaNetConfig, FfnConfig, GateFunction, OutputGate, ShortConvConfig
from engine.model.weights import LayerWeights


def plain_layer(layer: LayerWeights) -> bool:
    """Whether kernels compute all of a layer."""
    beside = layer.laurel, layer.layer_input, layer.streams, layer.ngrams
    if any(part is not None for part in beside) or layer.output_scale != 1.0:
        return False
    mixes = plain_recurrent(layer) if layer.recurrent is not None else plain_attention(layer)
    return layer.mixer_skip is None and mixes and plain_ffn(layer)


def plain_recurrent(layer: LayerWeights) -> bool:
    """Whether a layer has a recurrent mixer alone, and kernels compute all of it."""
    config = layer.config.mixer
    if isinstance(config, ShortConvConfig):
        return fits_short_conv(config)
    return isinstance(config, DeltaNetConfig) and fits_delta_net(config)


def plain_attention(layer: LayerWeights) -> bool:
    """Whether a layer has attention, and kernels compute all of it, from its products to its output."""
    config = layer.config.mixer
    if not isinstance(config, AttentionConfig):
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
    """Whether a layer has a dense feed-forward part, kernels compute all of it, and the layer ends with it."""
    config = layer.config
    plain = isinstance(config.ffn, FfnConfig) and plain_gate(config.ffn)
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
