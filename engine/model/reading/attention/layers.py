"""Attention layer by layer, from metadata."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.errors import ModelFileError, UnsupportedModelError
from engine.model.config import (
    AttentionConfig,
    AttentionTemperature,
    IndexerConfig,
    LatentConfig,
    OutputGate,
    QkNorm,
    QkWeights,
    RopeConfig,
)
from engine.model.parts import AttentionParts, IndexerParts, Presence, TemperatureParts
from engine.model.reading.attention.compressed import block_rope, read_compressed
from engine.model.reading.attention.indexer import read_indexer
from engine.model.reading.attention.latent import latent_sharpening, read_latent
from engine.model.reading.attention.rope import read_layer_rope
from engine.model.reading.attention.shared_caches import share_caches
from engine.model.reading.attention.windows import read_windows
from engine.model.reading.metadata import LIMIT
from engine.model.reading.source import Source


def read_attention(source: Source, attends: Sequence[bool]) -> list[AttentionConfig | None]:
    """Attention of each layer; None where it has none.

    Args:
        source: the file.
        attends: whether each layer has attention.

    Raises:
        ModelFileError: the numbers of heads contradict each other or the width, or a key has a wrong value.
    """
    read, parts = source.read, source.architecture.attention
    assert parts is not None
    least = 1 if all(attends) else 0  # other layers may have no heads
    heads = read.per_layer("attention.head_count", source.n_blocks, low=least)
    kv_heads = read.per_layer("attention.head_count_kv", source.n_blocks, default=heads, low=least)
    windows = read_windows(source, parts.window)
    layers = [
        _layer(source, parts, index, heads[index], kv_heads[index], windows) if has else None
        for index, has in enumerate(attends)
    ]
    return share_caches(source, parts, layers) if parts.shared_caches else layers


def _layer(
    source: Source, parts: AttentionParts, index: int, heads: int, kv_heads: int, windows: list[int | None]
) -> AttentionConfig:
    if not kv_heads or not heads or heads % kv_heads:
        raise ModelFileError(
            f"layer {index} has {heads} heads and {kv_heads} key/value heads; both must be positive, and "
            "the second must divide the first"
        )
    windowed = parts.window is not None and parts.window.head_widths and windows[index] is not None
    latent = read_latent(source, index, windowed=windowed) if parts.latent else None
    if latent is None:
        key_width, value_width = (_head_width(source, heads, which, windowed) for which in ("key", "value"))
        rotated = key_width
    else:
        kv_heads, key_width, value_width = latent.cached(heads)
        rotated = latent.rope_width
    rope = read_layer_rope(source, index, rotated, windows)
    if parts.compressed and rope is not None:
        rope = block_rope(source, index, rope)
    chunks = parts.window is not None and parts.window.chunks
    return AttentionConfig(
        n_heads=heads,
        n_kv_heads=kv_heads,
        key_width=key_width,
        value_width=value_width,
        scale=_scale(source, parts, heads, key_width, latent, rope),
        rope=rope,
        causal=_causal(source, parts, windows),
        window=None if chunks else windows[index],
        chunk=windows[index] if chunks else None,
        qk_norm=_qk_norm(source, parts, index, rope),
        qk_norm_after_rope=parts.qk_norm is not None and parts.qk_norm.after_rope,
        qk_norm_weights=QkWeights.BOTH if parts.qk_norm is None else parts.qk_norm.weights,
        temperature=_temperature(source, parts.temperature, rope, windows),
        clamp=(source.read.number("attention.clamp_kqv", 0.0, low=0.0) or None) if parts.clamp else None,
        softcap=source.default("attn_logit_softcapping", parts.softcap),
        sinks=_has_sinks(source, parts, index),
        alibi=_alibi(source, parts),
        latent=latent,
        output_gate=_output_gate(source, parts, index, heads),
        gate_function=parts.gate_function,
        value_scale=_value_scale(source, parts),
        value_norm=parts.value_norm,
        sub_norm=parts.sub_norm,
        compressed=read_compressed(source, index, heads, kv_heads, rope) if parts.compressed else None,
        indexer=_indexer(source, parts.indexer, index, kv_heads, rope, windows),
        relative_buckets=_relative_buckets(source) if parts.relative_buckets else 0,
    )


def _causal(source: Source, parts: AttentionParts, windows: list[int | None]) -> bool:
    causal = source.read.flag("attention.causal", parts.causal)
    if not causal and any(windows) and not (parts.window is not None and parts.window.symmetric):
        raise UnsupportedModelError(
            f"metadata key {source.name}.attention.causal is false in a model with sliding windows; architecture "
            f"{source.name!r} is only known with windows of earlier positions"
        )
    return causal


def _relative_buckets(source: Source) -> int:
    count = source.read.integer("attention.relative_buckets_count", low=4, high=4096)
    if count % 4:
        raise ModelFileError(
            f"metadata key {source.name}.attention.relative_buckets_count is {count}; allowed is a multiple of 4"
        )
    return count


def _indexer(
    source: Source,
    parts: IndexerParts | None,
    index: int,
    kv_heads: int,
    rope: RopeConfig | None,
    windows: Sequence[int | None],
) -> IndexerConfig | None:
    """The indexer of a layer; those with a window read all that it leaves them."""
    if parts is None or windows[index] is not None:
        return None
    return read_indexer(source, parts, index, kv_heads, rope)


def _head_width(source: Source, heads: int, which: str, windowed: bool) -> int:
    """Width of a head's keys or values; where the file does not state it, all heads share the model's width."""
    key = f"attention.{which}_length"
    if windowed and source.read.has(f"{key}_swa"):
        return source.read.integer(f"{key}_swa")
    if not source.read.has(key) and source.width % heads:
        raise ModelFileError(
            f"embedding_length {source.width} is not a multiple of the head count {heads}; "
            f"allowed with a stated {key} only, which is missing"
        )
    return source.read.integer(key, max(1, source.width // heads))


def _scale(
    source: Source,
    parts: AttentionParts,
    heads: int,
    key_width: int,
    latent: LatentConfig | None,
    rope: RopeConfig | None,
) -> float:
    """The factor of scores."""
    if parts.fixed_scale is not None:
        return parts.fixed_scale
    if parts.output_scale is not None:
        return source.read.number("attention.output_scale", parts.output_scale, low=0.0, high=LIMIT)
    if parts.scale:
        stated = source.read.number("attention.scale", 0.0, low=0.0, high=LIMIT)
        if stated:
            return stated
    if parts.unscaled:
        return 1.0
    if source.n_layers in parts.scale_by_width:
        return math.sqrt(heads / source.width)
    if latent is None:
        return 1.0 / (key_width if parts.linear_scale else math.sqrt(key_width))
    scale = 1.0 / math.sqrt(latent.nope_width + latent.rope_width)
    return scale if rope is None else scale * latent_sharpening(source, rope)


def _qk_norm(source: Source, parts: AttentionParts, index: int, rope: RopeConfig | None) -> QkNorm | None:
    norm = parts.qk_norm
    if norm is None or (norm.rotated and rope is None):
        return None
    if norm.not_of_experts is not None:
        usual = source.read.integer("expert_count", 0, low=0) != norm.not_of_experts
        if not source.read.flag("attention.use_qk_norm", usual):
            return None
    if norm.presence is Presence.OPTIONAL and f"{source.prefix}.{index}.attn_q_norm.weight" not in source.tensors:
        return None
    return norm.kind


def _alibi(source: Source, parts: AttentionParts) -> float:
    if parts.alibi_layers not in (None, source.n_layers):
        return 0.0
    return source.default("attention.max_alibi_bias", parts.alibi) or 0.0


def _has_sinks(source: Source, parts: AttentionParts, index: int) -> bool:
    if parts.sinks is Presence.OPTIONAL:
        return f"blk.{index}.attn_sinks.weight" in source.tensors
    return parts.sinks is Presence.ALWAYS


def _output_gate(source: Source, parts: AttentionParts, index: int, heads: int) -> OutputGate | None:
    gate = source.tensors.get(f"blk.{index}.attn_gate.weight")
    if parts.output_gate is OutputGate.OWN and gate is not None and gate.shape[0] == heads:
        return OutputGate.PER_HEAD
    return parts.output_gate


def _value_scale(source: Source, parts: AttentionParts) -> float:
    """The factor of values; 0 in the file means none."""
    if not parts.value_scale:
        return 1.0
    return source.read.number("attention.value_scale", 1.0, low=-LIMIT, high=LIMIT) or 1.0


def _temperature(
    source: Source, parts: TemperatureParts | None, rope: RopeConfig | None, windows: Sequence[int | None]
) -> AttentionTemperature | None:
    """Attention temperature; a scale of 0 in the file means none."""
    if parts is None or (parts.unrotated and (rope is not None or not any(windows))):
        return None
    read = source.read
    scale = read.number("attention.temperature_scale", parts.scale, low=-LIMIT, high=LIMIT)
    if scale == 0.0:
        return None
    length = read.integer("attention.temperature_length", 0, low=0) or parts.length
    if length is None:
        length = read.integer("rope.scaling.original_context_length", source.context_length)
    return AttentionTemperature(scale, length, parts.offset)
