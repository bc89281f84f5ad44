"""Weights of RWKV's time mixing and channel mixing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.model.building.source import TensorSource
from engine.model.config import ChannelMixConfig, NormKind, Rwkv6Config, Rwkv7Config, TimeMixConfig
from engine.model.weights import ChannelMixWeights, Float32Array, LowRank, Norm, Rwkv6Weights, Rwkv7Weights

EPSILON = 64e-5
"""That of the heads' norms; files do not state it."""


def build_rwkv_6(source: TensorSource, prefix: str, config: Rwkv6Config) -> Rwkv6Weights:
    """Time mixing of the layer whose tensors' names begin with `prefix`."""
    tensors, width = source.tensors, source.width
    kv_rows, heads = config.kv_heads * config.head_width, (config.heads, config.head_width)
    return Rwkv6Weights(
        lerp_x=_vector(source, f"{prefix}.time_mix_lerp_x"),
        lerp=_lerps(source, prefix, 5, "wkvrg"),
        mix_a=source.linear(f"{prefix}.time_mix_w1", 5 * config.mix_rank, width),
        mix_b=source.experts(f"{prefix}.time_mix_w2", 5, width, config.mix_rank),
        decay=_low_rank(source, f"{prefix}.time_mix_decay_w", config.decay_rank, f"{prefix}.time_mix_decay"),
        first=None if config.linear_attention else tensors.vector(f"{prefix}.time_mix_first.weight", heads),
        receptance=source.linear(f"{prefix}.time_mix_receptance", width, width),
        key=source.linear(f"{prefix}.time_mix_key", kv_rows, width),
        value=source.linear(f"{prefix}.time_mix_value", kv_rows, width),
        gate=source.linear(f"{prefix}.time_mix_gate", width, width),
        output=source.linear(f"{prefix}.time_mix_output", width, width),
        norm=None if config.linear_attention else _head_norm(source, prefix, config),
    )


def build_rwkv_7(source: TensorSource, prefix: str, config: Rwkv7Config) -> Rwkv7Weights:
    """The same of version 7."""
    width, values = source.width, f"{prefix}.time_mix_v"
    if config.first:  # files hold what other layers take from the first one's values
        source.tensors.ignore(f"{values}{part}.weight" for part in range(3))
    return Rwkv7Weights(
        lerp=_lerps(source, prefix, config.mixed),
        receptance=source.linear(f"{prefix}.time_mix_receptance", width, width),
        key=source.linear(f"{prefix}.time_mix_key", width, width),
        value=source.linear(f"{prefix}.time_mix_value", width, width),
        decay=_low_rank(source, f"{prefix}.time_mix_w", config.decay_rank, f"{prefix}.time_mix_w0"),
        rate=_low_rank(source, f"{prefix}.time_mix_a", config.rate_rank, f"{prefix}.time_mix_a0"),
        first_value=None if config.first else _low_rank(source, values, config.value_rank, f"{values}0"),
        gate=_low_rank(source, f"{prefix}.time_mix_g", config.gate_rank) if config.gate_rank else None,
        k_k=_vector(source, f"{prefix}.time_mix_k_k"),
        k_a=_vector(source, f"{prefix}.time_mix_k_a"),
        r_k=_vector(source, f"{prefix}.time_mix_r_k").reshape(config.heads, config.head_width),
        norm=_head_norm(source, prefix, config) if config.norm else None,
        output=source.linear(f"{prefix}.time_mix_output", width, width),
    )


def build_channel_mix(source: TensorSource, prefix: str, config: ChannelMixConfig) -> ChannelMixWeights:
    """Channel mixing of the layer whose tensors' names begin with `prefix`."""
    width, gated = source.width, config.receptance
    return ChannelMixWeights(
        lerp_k=_vector(source, f"{prefix}.channel_mix_lerp_k"),
        key=source.linear(f"{prefix}.channel_mix_key", config.width, width),
        value=source.linear(f"{prefix}.channel_mix_value", width, config.width),
        lerp_r=_vector(source, f"{prefix}.channel_mix_lerp_r") if gated else None,
        receptance=source.linear(f"{prefix}.channel_mix_receptance", width, width) if gated else None,
    )


def _lerps(source: TensorSource, prefix: str, count: int, apart: str = "") -> Float32Array:
    """(count, D) of one tensor, or of one per input in older files, whose names end in the letters of `apart`."""
    name = f"{prefix}.time_mix_lerp_fused.weight"
    if apart and not source.tensors.has(name):
        return np.stack([_vector(source, f"{prefix}.time_mix_lerp_{letter}") for letter in apart])
    return source.tensors.array(name, (count, source.width))


def _low_rank(source: TensorSource, name: str, rank: int, offset: str | None = None) -> LowRank:
    a, b = source.linear(f"{name}1", rank, source.width), source.linear(f"{name}2", source.width, rank)
    return LowRank(a, b if offset is None else replace(b, bias=_vector(source, offset)))


def _head_norm(source: TensorSource, prefix: str, config: TimeMixConfig) -> Norm:
    heads = config.heads, config.head_width
    weight, bias = (
        source.tensors.vector(f"{prefix}.time_mix_ln.{part}", (source.width,)).reshape(heads)
        for part in ("weight", "bias")
    )
    return Norm(NormKind.LAYER, EPSILON, weight, bias)


def _vector(source: TensorSource, name: str) -> Float32Array:
    return source.tensors.array(f"{name}.weight", (source.width,))
