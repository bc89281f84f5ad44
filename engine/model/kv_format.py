"""Cached keys and values of 8 bits: what a row holds, how it is rounded, and which models can have it.

The one description that both devices follow and that a test compares with the gguf package. Layouts in memory are not
decided here (see engine.model.cache); this module knows no pages.

A row is one position of one head of keys (behind RoPE) or of values. It is stored as blocks of Q8_0 (ggml-quants.c,
quantize_row_q8_0): for every BLOCK neighbouring columns x,

    d = max|x| / 127                        in float32
    q = round(x * (1 / d))                  int8, halves away from zero, product and reciprocal in float32
    s = d rounded to float16                what is stored beside q

and read as q * s in float32, where no rounding is left. Where s is 0, infinite or not a number, all q are 0: a block of
numbers below 3.8e-6 reads as zeros, and one that holds what is no number, or more than 8.3e6, as no numbers. Attention
reads what is stored and nothing else, a prompt's own positions included, so a row has the same bits in any batch.

Rounded are keys and values of attention. Keys of an indexer are kept as float16, and recurrent states as float32, as
always. Latent vectors are not rounded: models that cache them are refused.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.config import KV_BLOCK as BLOCK
from engine.config import KvType
from engine.errors import InvalidRequestError
from engine.model.config import AttentionConfig, ModelConfig


def quantize(x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Rows x (..., W), W a multiple of BLOCK, as int8 (..., W) and scales float16 (..., W / BLOCK)."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        d = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
        scales = d.astype(np.float16)
        usable = (scales != 0) & np.isfinite(scales)
        scaled = np.where(usable, blocks * (np.float32(1) / np.where(usable, d, np.float32(1))), np.float32(0))
    # Halves away from zero: the largest number below 0.5 is added, so that 0.49999997 does not become 1.
    q = np.trunc(scaled + np.copysign(np.nextafter(np.float32(0.5), np.float32(0)), scaled)).astype(np.int8)
    return q.reshape(x.shape), scales[..., 0]


def dequantize(q: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """The numbers float32 (..., W) of what quantize() gave."""
    blocks = q.reshape(*q.shape[:-1], -1, BLOCK)
    with np.errstate(invalid="ignore"):
        read: npt.NDArray[np.float32] = blocks.astype(np.float32) * scales[..., None].astype(np.float32)
    return read.reshape(q.shape)


def check_kv_type(config: ModelConfig, kv_type: KvType) -> None:
    """Refuse a cache type that the attention of a model cannot be cached in.

    Models that predict no tokens keep no cache, so that their numbers have the format that suits the device.

    Raises:
        InvalidRequestError: says what stands in the way and which types are possible.
    """
    if kv_type is not KvType.Q8_0 or not config.generates:
        return
    for layer in config.layers:
        reason = None if layer.attention_part is None else _hindrance(layer.attention_part)
        if reason is not None:
            raise InvalidRequestError(
                f"kv_type is 'q8_0'; model {config.name!r} ({config.architecture}) cannot have such a cache, for "
                f"layer {layer.index} {reason}: use f16 or f32"
            )


def _hindrance(attention: AttentionConfig) -> str | None:
    if attention.values_in_keys:
        return "caches latent vectors, which are keys and values at once and stay float"
    for name, width in (("keys", attention.key_width), ("values", attention.value_width)):
        if width % BLOCK:
            return f"has {name} of {width} numbers per head, and blocks of Q8_0 need multiples of {BLOCK}"
    return None
