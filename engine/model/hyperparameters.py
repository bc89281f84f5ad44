"""From an architecture's declaration and a file's metadata to a ModelConfig. Written once for all architectures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.errors import ModelFileError, UnsupportedModelError
from engine.model.architecture import Architecture, MoeParts
from engine.model.config import (
    AttentionConfig,
    AttentionTemperature,
    FfnConfig,
    LayerConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    RopeScaling,
)
from engine.model.metadata import HyperParameters

LIMIT = 1e6
"""Largest factor believed; anything beyond is a damaged file."""


def read_config(
    architecture: Architecture, metadata: Mapping[str, Any], *, vocab_size: int, n_tensors: int
) -> ModelConfig:
    """Hyper-parameters of a file.

    Args:
        architecture: what the family reads.
        metadata: all metadata of the file.
        vocab_size: rows of token_embd.
        n_tensors: tensors in the file, the bound on what block_count may claim.

    Raises:
        ModelFileError: a key is missing, of the wrong type, or out of range.
        UnsupportedModelError: a value asks for something that is not supported.
    """
    read = HyperParameters(metadata, architecture.name)
    n_layers = read.integer("block_count", high=max(1, n_tensors))
    width = read.integer("embedding_length")
    n_heads = read.per_layer("attention.head_count", n_layers)
    n_kv_heads = read.per_layer("attention.head_count_kv", n_layers, default=n_heads)
    ffn_widths = read.per_layer("feed_forward_length", n_layers, low=0)
    context_length = read.integer("context_length")
    temperature = _temperature(architecture, read, context_length)
    layers = []
    rope_cache: dict[int, RopeConfig] = {}
    for index in range(n_layers):
        heads, kv_heads = n_heads[index], n_kv_heads[index]
        if heads % kv_heads:
            raise ModelFileError(
                f"layer {index} has {heads} heads and {kv_heads} key/value heads; the second must divide the first"
            )
        key_width = read.integer("attention.key_length", _default_head_width(read, width, heads))
        value_width = read.integer("attention.value_length", _default_head_width(read, width, heads, "value"))
        if key_width not in rope_cache:
            rope_cache[key_width] = _rope(architecture, read, key_width, context_length)
        attention = AttentionConfig(
            n_heads=heads,
            n_kv_heads=kv_heads,
            key_width=key_width,
            value_width=value_width,
            scale=1.0 / math.sqrt(key_width),
            rope=rope_cache[key_width],
            window=_window(architecture, read),
            qk_norm=architecture.qk_norm,
            temperature=temperature,
        )
        layers.append(
            LayerConfig(index=index, attention=attention, ffn=_ffn(architecture, read, index, ffn_widths[index]))
        )
    name = metadata.get("general.name")
    return ModelConfig(
        architecture=architecture.name,
        name=name if isinstance(name, str) else "",
        width=width,
        vocab_size=vocab_size,
        context_length=context_length,
        norm=architecture.norm,
        norm_epsilon=read.number("attention.layer_norm_rms_epsilon", low=0.0, high=1.0),
        layers=tuple(layers),
    )


def _default_head_width(read: HyperParameters, width: int, heads: int, which: str = "key") -> int:
    """Head width where the file does not state it."""
    if not read.has(f"attention.{which}_length") and width % heads:
        raise ModelFileError(
            f"embedding_length {width} is not a multiple of the head count {heads}; "
            f"allowed with a stated attention.{which}_length only, which is missing"
        )
    return max(1, width // heads)


def _window(architecture: Architecture, read: HyperParameters) -> int | None:
    """Sliding window of a layer; 0 in the file means none."""
    if not architecture.sliding_window:
        return None
    return read.integer("attention.sliding_window", 0, low=0) or None


def _temperature(architecture: Architecture, read: HyperParameters, context_length: int) -> AttentionTemperature | None:
    """Attention temperature; a scale of 0 in the file means none."""
    scale = read.number("attention.temperature_scale", 0.0, low=-LIMIT, high=LIMIT) if architecture.temperature else 0.0
    if scale == 0.0:
        return None
    return AttentionTemperature(scale, read.integer("rope.scaling.original_context_length", context_length))


def _rope(architecture: Architecture, read: HyperParameters, key_width: int, context_length: int) -> RopeConfig:
    n_rot = read.integer("rope.dimension_count", key_width, high=key_width)
    if n_rot % 2:
        raise ModelFileError(
            f"metadata key {architecture.name}.rope.dimension_count is {n_rot}; allowed is an even number"
        )
    base = read.number("rope.freq_base", 10000.0, high=LIMIT**4)
    if base <= 1.0:
        raise ModelFileError(
            f"metadata key {architecture.name}.rope.freq_base is {base:g}; allowed is a number above 1"
        )
    name = read.text("rope.scaling.type", "linear")
    names = {scaling.value: scaling for scaling in RopeScaling}
    if name not in names:
        raise UnsupportedModelError(f"rope.scaling.type {name!r} is not supported; supported are: {', '.join(names)}")
    # Files write 0 for "no scaling"; scale_linear is the key's older name.
    old_factor = read.number("rope.scale_linear", 0.0, low=0.0, high=LIMIT)
    factor = read.number("rope.scaling.factor", old_factor, low=0.0, high=LIMIT) or 1.0
    if factor < 1.0 / LIMIT:
        raise ModelFileError(
            f"{architecture.name}.rope.scaling.factor is {factor:g}; allowed is 0 or at least {1.0 / LIMIT:g}"
        )
    scaling = names[name]
    if scaling is RopeScaling.LINEAR and factor == 1.0:
        scaling = RopeScaling.NONE
    extrapolation = read.number("rope.scaling.yarn_ext_factor", -1.0, high=1.0)
    return RopeConfig(
        style=architecture.rope,
        n_rot=n_rot,
        base=base,
        scaling=scaling,
        factor=1.0 if scaling is RopeScaling.NONE else factor,
        original_context=read.integer("rope.scaling.original_context_length", 0, low=0) or context_length,
        extrapolation=1.0 if extrapolation < 0.0 else extrapolation,
        attention_factor=read.number("rope.scaling.attn_factor", 1.0, low=-LIMIT, high=LIMIT),
        beta_fast=_positive(read, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_positive(read, "rope.scaling.yarn_beta_slow", 1.0),
        log_multiplier=read.number("rope.scaling.yarn_log_multiplier", 0.0, low=0.0, high=LIMIT),
    )


def _positive(read: HyperParameters, key: str, default: float) -> float:
    """A number above zero; files write 0 or a negative number for "the usual"."""
    value = read.number(key, default, high=LIMIT)
    return value if value > 0.0 else default


def _ffn(architecture: Architecture, read: HyperParameters, index: int, width: int) -> FfnConfig | MoeConfig:
    parts = architecture.moe
    n_experts = read.integer("expert_count", 0, low=0) if parts is not None else 0
    if parts is None or (n_experts == 0 and not parts.required):
        if width == 0:
            raise ModelFileError(f"feed_forward_length of layer {index} is 0; allowed is a positive integer")
        return FfnConfig(width=width, activation=architecture.activation, gated=architecture.gated)
    return _moe(architecture, parts, read, width)


def _moe(architecture: Architecture, parts: MoeParts, read: HyperParameters, width: int) -> MoeConfig:
    n_experts = read.integer("expert_count")
    expert_width = read.integer("expert_feed_forward_length", 0, low=0) or width
    if expert_width == 0:
        raise ModelFileError("expert_feed_forward_length and feed_forward_length are both 0; one must be positive")
    shared = None
    if parts.shared:
        shared_width = read.integer("expert_shared_feed_forward_length", 0, low=0) or width
        if shared_width:
            shared = FfnConfig(width=shared_width, activation=architecture.activation, gated=architecture.gated)
    scale = read.number("expert_weights_scale", 0.0, low=-LIMIT, high=LIMIT) if parts.weight_scale else 0.0
    return MoeConfig(
        n_experts=n_experts,
        n_used=read.integer("expert_used_count", high=n_experts),
        expert=FfnConfig(width=expert_width, activation=architecture.activation, gated=architecture.gated),
        routing=parts.routing,
        normalize=parts.normalize,
        weight_scale=scale or 1.0,
        shared=shared,
        shared_gate=parts.shared_gate,
    )
