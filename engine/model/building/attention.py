"""Weights of attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.model.building.compressed import build_compressed
from engine.model.building.indexer import build_indexer
from engine.model.building.positions import PositionTables
from engine.model.building.source import TensorSource
from engine.model.config import AttentionConfig, LatentConfig, NormKind, OutputGate, QkNorm, QkWeights
from engine.model.weights import AttentionWeights, Float32Array, LatentWeights, Linear, Norm


def build_attention(
    source: TensorSource, positions: PositionTables, prefix: str, attention: AttentionConfig
) -> AttentionWeights:
    """Attention of the layer whose tensors' names begin with `prefix`."""
    heads, latent = attention.n_heads, attention.latent
    sinks = source.tensors.vector(f"{prefix}.attn_sinks.weight", (heads,)) if attention.sinks else None
    value_width = attention.value_width if latent is None else latent.value_width
    parts = source.architecture.attention
    assert parts is not None
    compressed = attention.compressed
    columns = heads * value_width if compressed is None else compressed.groups * compressed.output_rank
    output = source.linear(f"{prefix}.{parts.output}", source.width, columns)
    output = replace(output, scale=output.scale * attention.value_scale)
    own = latent is None and compressed is None
    q, k, v = _qkv(source, prefix, attention) if own else (None, None, None)
    latent_weights = None if latent is None else _latent(source, prefix, heads, latent)
    gate, query_gate = None, None
    if attention.output_gate is OutputGate.IN_QUERY and q is not None:
        size = attention.key_width
        query_gate = q.every(0, size, 2 * size, "queries"), q.every(size, size, 2 * size, "gates")
    if attention.output_gate in (OutputGate.OWN, OutputGate.PER_HEAD):
        rows = heads if attention.output_gate is OutputGate.PER_HEAD else heads * value_width
        gate = source.linear(f"{prefix}.attn_gate", rows, source.width)
    # Tables come last: by now shapes of tensors confirm the numbers of heads and of rotated elements.
    return AttentionWeights(
        output=output,
        rope=positions.rope(attention.rope),
        q=q,
        k=k,
        v=v,
        q_norm=_qk_norm(source, f"{prefix}.attn_q_norm", attention, heads),
        k_norm=_k_norm(source, prefix, attention),
        sinks=sinks,
        alibi_slopes=positions.alibi_slopes(attention),
        latent=latent_weights,
        gate=gate,
        sub_norm=source.norm(f"{prefix}.attn_sub_norm", (heads * value_width,)) if attention.sub_norm else None,
        v_norm=Norm(NormKind.RMS, source.config.norm_epsilon, None) if attention.value_norm else None,
        query_gate=query_gate,
        compressed=None if compressed is None else build_compressed(source, prefix, attention, compressed),
        relative_bias=_relative_bias(source, prefix, attention) if attention.relative_buckets else None,
        indexer=None if attention.indexer is None else build_indexer(source, positions, prefix, attention),
    )


def _relative_bias(source: TensorSource, prefix: str, attention: AttentionConfig) -> Float32Array:
    """Biases of distances (buckets, H): the layer's own, else those of the first layer."""
    name, shape = f"{prefix}.attn_rel_b.weight", (attention.relative_buckets, attention.n_heads)
    if not source.tensors.has(name):
        name = f"{source.architecture.layer.prefix}.0.attn_rel_b.weight"
    return source.tensors.vector(name, shape)


def _qkv(source: TensorSource, prefix: str, attention: AttentionConfig) -> tuple[Linear, Linear | None, Linear | None]:
    """Projections to queries, keys and values; row ranges of one tensor where the file has attn_qkv."""
    parts, tensors = source.architecture.attention, source.tensors
    assert parts is not None
    q_rows = attention.n_heads * attention.key_width * (2 if attention.output_gate is OutputGate.IN_QUERY else 1)
    k_rows = attention.n_kv_heads * attention.key_width
    v_rows = attention.n_kv_heads * attention.value_width
    shared = attention.cache_layer is not None
    if tensors.has(f"{prefix}.attn_qkv.weight"):
        fused = source.linear(f"{prefix}.attn_qkv", q_rows + k_rows + v_rows, source.width)
        q, k = fused.slice_rows(0, q_rows), fused.slice_rows(q_rows, q_rows + k_rows)
        return (q, None, None) if shared else (q, k, fused.slice_rows(q_rows + k_rows, q_rows + k_rows + v_rows))
    q = source.linear(f"{prefix}.attn_q", q_rows, source.width)
    if shared:
        tensors.ignore(f"{prefix}.{name}.*" for name in ("attn_k", "attn_v", "attn_k_norm"))
        return q, None, None
    k = source.linear(f"{prefix}.attn_k", k_rows, source.width)
    if parts.values_like_keys and not tensors.has(f"{prefix}.attn_v.weight"):
        return q, k, k
    return q, k, source.linear(f"{prefix}.attn_v", v_rows, source.width)


def _qk_norm(source: TensorSource, name: str, attention: AttentionConfig, heads: int) -> Norm | None:
    if attention.qk_norm is None:
        return None
    parts, width = source.architecture.attention, attention.key_width
    assert parts is not None
    assert parts.qk_norm is not None
    kind = parts.qk_norm.norm or source.config.norm
    epsilon = source.config.norm_epsilon if parts.qk_norm.epsilon is None else parts.qk_norm.epsilon
    if attention.qk_norm_weights is QkWeights.QUERY_GAINS and name.endswith("attn_q_norm"):
        gains = source.tensors.vector(f"{name}.weight", (heads, 1))
        return Norm(kind, epsilon, np.repeat(gains, width, axis=1))
    if attention.qk_norm_weights is not QkWeights.BOTH:
        return Norm(kind, epsilon, None)
    shapes = {QkNorm.HEAD: (width,), QkNorm.EACH_HEAD: (heads, width), QkNorm.WIDTH: (heads * width,)}
    return replace(source.norm(name, shapes[attention.qk_norm], optional_bias=True), kind=kind, epsilon=epsilon)


def _k_norm(source: TensorSource, prefix: str, attention: AttentionConfig) -> Norm | None:
    if attention.cache_layer is not None:
        return None
    return _qk_norm(source, f"{prefix}.attn_k_norm", attention, attention.n_kv_heads)


def _latent(source: TensorSource, prefix: str, heads: int, latent: LatentConfig) -> LatentWeights:
    tensors, width = source.tensors, source.width
    q_rows = heads * (latent.nope_width + latent.rope_width)
    q, q_a, q_a_norm, q_b = None, None, None, None
    if latent.q_rank is None:
        q = source.linear(f"{prefix}.attn_q", q_rows, width)
    else:
        q_a = source.linear(f"{prefix}.attn_q_a", latent.q_rank, width)
        q_a_norm = source.norm(f"{prefix}.attn_q_a_norm", (latent.q_rank,))
        q_b = source.linear(f"{prefix}.attn_q_b", q_rows, latent.q_rank)
    k_b, v_b, kv_b = None, None, None
    if latent.absorbed:
        k_b = tensors.experts(f"{prefix}.attn_k_b", heads, latent.rank, latent.nope_width)
        v_b = tensors.experts(f"{prefix}.attn_v_b", heads, latent.value_width, latent.rank)
    else:
        rows = heads * (latent.nope_width + latent.value_width)
        kv_b = source.linear(f"{prefix}.attn_kv_b", rows, latent.rank)
    return LatentWeights(
        q=q,
        q_a=q_a,
        q_a_norm=q_a_norm,
        q_b=q_b,
        kv_a=source.linear(f"{prefix}.attn_kv_a_mqa", latent.rank + latent.rope_width, width),
        kv_a_norm=source.norm(f"{prefix}.attn_kv_a_norm", (latent.rank,)),
        k_b=k_b,
        v_b=v_b,
        kv_b=kv_b,
        k_norm=source.norm(f"{prefix}.attn_k_norm", (latent.rope_width,)) if latent.key_norm else None,
    )
