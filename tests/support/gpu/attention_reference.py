"""A float64 reference of attention over a contiguous history, and random paged caches to compare it on."""

import numpy as np

from engine.config import KvType
from engine.cuda.attention.attention import PAGE, AttentionShape, KernelRopeStyle, LayerAttention
from engine.model.kv_format import dequantize, quantize


def shape_of(
    heads=8, kv_heads=2, dim=64, *, value_dim=None, rope_dim=None, style=KernelRopeStyle.HALVES, half=True, **options
) -> AttentionShape:
    """half: True for float16, False for float32, or a KvType."""
    rope = dim // 2 * 2 if rope_dim is None else rope_dim
    kv_type = half if isinstance(half, KvType) else KvType.F16 if half else KvType.F32
    return AttentionShape(heads, kv_heads, dim, value_dim or dim, rope, style, kv_type, **options)


def empty_pages(shape, n_pages, dim):
    """Keys or values on the host with garbage in them: NaN, or bytes with scales, which a cache must have finite."""
    size, dtype = shape.cache_array(n_pages, dim)
    if not shape.bytes_cached:
        return np.full(size, np.nan, dtype)
    rng = np.random.default_rng(n_pages)
    pages = rng.integers(0, 256, size, dtype=np.uint8)
    scales = rng.uniform(0.01, 300, (*size[:2], PAGE * dim // 32)).astype(np.float16)
    pages[..., PAGE * dim :] = scales.view(np.uint8)
    return pages


def numbers(shape, pages, dim):
    """What pages hold: (N, K, PAGE, dim), float32 where they are bytes."""
    if not shape.bytes_cached:
        return pages
    bytes, scales = pages[..., : PAGE * dim], np.ascontiguousarray(pages[..., PAGE * dim :]).view(np.float16)
    quants = (bytes.astype(np.int16) - 128).astype(np.int8).reshape(*pages.shape[:2], PAGE, dim)
    return dequantize(quants, scales.reshape(*pages.shape[:2], PAGE, dim // 32))


def rounded(shape, rows):
    """Rows (..., dim) float32 as the cache rounds them."""
    if shape.bytes_cached and np.size(rows):
        return dequantize(*quantize(np.asarray(rows, np.float32)))
    return np.asarray(rows, np.float32).astype(np.float16 if shape.kv_type is KvType.F16 else np.float32)


def put_row(shape, pages, page, place, row):
    """Puts a position's rows (K, dim) into a page."""
    dim = row.shape[-1]
    if not shape.bytes_cached:
        pages[page, :, place] = row
        return
    quants, scales = quantize(np.asarray(row, np.float32))
    pages[page, :, place * dim : (place + 1) * dim] = (quants.astype(np.int16) + 128).astype(np.uint8)
    at, n = PAGE * dim + place * dim // 16, dim // 16
    pages[page, :, at : at + n] = scales.view(np.uint8)


CACHED_BOUND = {KvType.F16: 1e-6, KvType.F32: 1e-12, KvType.Q8_0: 1e-4}
"""Normalized squared error of rounding to a cache type."""


def rope64(x, positions, inv_freq, style, mscale):
    """x (T, heads, dim), rotated in its leading 2 * len(inv_freq) elements; float64 angles as the contract says."""
    angle = (positions.astype(np.float64)[:, None] * inv_freq[None])[:, None, :]
    cos, sin, n = np.cos(angle) * mscale, np.sin(angle) * mscale, len(inv_freq)
    out = x.copy()
    a, b = (
        (slice(0, n), slice(n, 2 * n)) if style is KernelRopeStyle.HALVES else (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
    )
    out[..., a], out[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., a] * sin + x[..., b] * cos
    return out


def rms64(x, weight, eps):
    return x if weight is None else x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def seen(shape, layer, position, n):
    """The first position that a query sees, and the one behind the last, of n."""
    if shape.both_ways:
        away = layer.window // 2 if layer.window else n
        return max(0, position - away), min(n, position + away + 1)
    if layer.window < 0:
        return position - position % -layer.window, position + 1
    return max(0, position - layer.window + 1) if layer.window else 0, position + 1


def attend64(shape, layer, q, keys, values, position):
    """One row: q (H, Hk), keys (n, K, Hk), values (n, K, Hv) of positions 0..n-1."""
    first, end = seen(shape, layer, position, len(keys))
    group = shape.heads // shape.kv_heads
    k = np.repeat(keys[first:end], group, axis=1)
    v = np.repeat(values[first:end], group, axis=1)
    scores = np.einsum("hd,phd->hp", q, k) * layer.scale
    if layer.softcap:
        scores = layer.softcap * np.tanh(scores / layer.softcap)
    distance = np.arange(first, end) - position
    if shape.distances:
        scores += layer.slopes[:, np.clip(distance, -shape.distances, shape.distances) + shape.distances]
    elif layer.slopes is not None:
        scores -= layer.slopes[:, None] * np.abs(distance)
    top = scores.max(1, keepdims=True)
    if layer.sinks is not None:
        top = np.maximum(top, layer.sinks[:, None])
    weights = np.exp(scores - top)
    total = weights.sum(1, keepdims=True)
    if layer.sinks is not None:
        total = total + np.exp(layer.sinks[:, None] - top)
    return np.einsum("hp,phd->hd", weights / total, v).ravel()


class World:
    """Random caches of several sequences on host and device, pages dealt in random order, garbage everywhere else."""

    def __init__(self, shape, lengths, *, seed=0, **options):
        import cupy

        self.cp, self.shape, self.rng = cupy, shape, np.random.default_rng(seed)
        rng, rope = self.rng, shape.rope_dim // 2
        self.lengths = lengths
        inv_freq = 10000.0 ** (-np.arange(rope) / max(rope, 1))
        norm = options.pop("qk_norm", False)
        sinks = options.pop("sinks", False)
        self.host = LayerAttention(
            shape.key_dim**-0.5,
            inv_freq,
            q_norm=rng.uniform(0.5, 1.5, shape.key_dim).astype(np.float32) if norm else None,
            k_norm=rng.uniform(0.5, 1.5, shape.key_dim).astype(np.float32) if norm else None,
            sinks=rng.normal(size=shape.heads).astype(np.float32) if sinks else None,
            slopes=self._slopes(),
            **options,
        )
        arrays = {name: getattr(self.host, name) for name in ("inv_freq", "q_norm", "k_norm", "sinks", "slopes")}
        device = {name: None if a is None else cupy.asarray(a) for name, a in arrays.items()}
        self.layer = LayerAttention(self.host.scale, rope_scale=self.host.rope_scale, window=self.host.window,
                                    softcap=self.host.softcap, temperature=self.host.temperature,
                                    temperature_length=self.host.temperature_length, **device)  # fmt: skip
        slots = max(lengths) // PAGE + 1
        order = rng.permutation(len(lengths) * slots + 3).astype(np.int32)
        self.table = order[: len(lengths) * slots].reshape(len(lengths), slots)
        n_pages = len(order)
        self.history = []
        self.pages = {}
        for name, dim in (("k", shape.key_dim), ("v", shape.value_dim)):
            self.pages[name] = empty_pages(shape, n_pages, dim)
        if shape.values_in_keys:
            self.pages["v"] = self.pages["k"]
        for s, length in enumerate(lengths):
            past = []
            for name, dim in (("k", shape.key_dim), ("v", shape.value_dim)):
                data = rounded(shape, rng.normal(size=(max(length, 0), shape.kv_heads, dim)))
                if name == "v" and shape.values_in_keys:
                    past.append(past[0][..., :dim])
                    continue
                for p in range(max(length, 0)):
                    put_row(shape, self.pages[name], self.table[s, p // PAGE], p % PAGE, data[p])
                past.append(data.astype(np.float64))
            self.history.append(past)
        self.cache_k = cupy.asarray(self.pages["k"])
        self.cache_v = self.cache_k if shape.values_in_keys else cupy.asarray(self.pages["v"])

    def _slopes(self):
        """Biases of distances, where the shape has them."""
        shape = self.shape
        if shape.distances:
            return self.rng.normal(size=(shape.heads, 2 * shape.distances + 1)).astype(np.float32)
        return self.rng.uniform(0.01, 0.5, shape.heads).astype(np.float32) if shape.alibi else None

    def rows(self, n):
        shape = self.shape
        rows = self.rng.normal(size=(n, shape.row_width)).astype(np.float32)
        if shape.values_in_keys:
            q_end = shape.heads * shape.key_dim
            k_end = q_end + shape.kv_heads * shape.key_dim
            keys = rows[:, q_end:k_end].reshape(n, shape.kv_heads, -1)
            rows[:, k_end:] = keys[..., : shape.value_dim].reshape(n, -1)
        return rows

    def split(self, qkv, positions):
        """Rotated float64 queries, and keys and values as the cache holds them."""
        shape, layer, n = self.shape, self.host, len(qkv)
        x = qkv.astype(np.float64)
        q_end = shape.heads * shape.key_dim
        k_end = q_end + shape.kv_heads * shape.key_dim
        q = rms64(x[:, :q_end].reshape(n, shape.heads, -1), layer.q_norm, layer.norm_eps)
        k = rms64(x[:, q_end:k_end].reshape(n, shape.kv_heads, -1), layer.k_norm, layer.norm_eps)
        q, k = (rope64(a, positions, layer.inv_freq, shape.rope_style, layer.rope_scale) for a in (q, k))
        v = x[:, k_end:].reshape(n, shape.kv_heads, -1)
        q = (
            q
            * (1 + layer.temperature * np.log(1 + np.maximum(positions, 0) // layer.temperature_length))[:, None, None]
        )
        return q, k, v

    def on_device(self, name):
        """Keys or values as the device has them now, see numbers()."""
        pages, dim = (self.cache_k, self.shape.key_dim) if name == "k" else (self.cache_v, self.shape.value_dim)
        return numbers(self.shape, pages.get(), self.shape.key_dim if self.shape.values_in_keys else dim)
