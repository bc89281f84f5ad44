"""Time mixing of RWKV's layers, from metadata and names of tensors."""

from __future__ import annotations

from engine.errors import ModelFileError
from engine.model.config import Rwkv6Config, Rwkv7Config
from engine.model.reading.source import Source


def read_rwkv_6(source: Source, index: int) -> Rwkv6Config:
    """Time mixing of layer `index`.

    Raises:
        ModelFileError: a key is missing or has an impossible value, or sizes contradict each other.
    """
    read = source.read
    heads, size = _heads(source)
    # Files of models that had no key heads of their own state 0.
    kv_heads = read.per_layer("attention.head_count_kv", source.n_blocks, (0,) * source.n_blocks, low=0)[index] or heads
    if heads % kv_heads:
        raise ModelFileError(
            f"metadata key {source.name}.attention.head_count_kv is {kv_heads}; allowed is a number that divides the "
            f"{heads} heads of wkv.head_size {size}, or 0"
        )
    return Rwkv6Config(
        heads=heads,
        head_width=size,
        channel_mix=_channel_mix(source),
        kv_heads=kv_heads,
        mix_rank=read.integer("time_mix_extra_dim"),
        decay_rank=read.integer("time_decay_extra_dim"),
        linear_attention=f"blk.{index}.time_mix_first.weight" not in source.tensors,
    )


def read_rwkv_7(source: Source, index: int) -> Rwkv7Config:
    """Time mixing of layer `index`; raises as read_rwkv_6."""
    read = source.read
    heads, size = _heads(source)
    return Rwkv7Config(
        heads=heads,
        head_width=size,
        channel_mix=_channel_mix(source),
        decay_rank=read.integer("attention.decay_lora_rank"),
        rate_rank=read.integer("attention.iclr_lora_rank"),
        value_rank=read.integer("attention.value_residual_mix_lora_rank"),
        gate_rank=read.integer("attention.gate_lora_rank", 0, low=0),
        norm=f"blk.{index}.time_mix_ln.weight" in source.tensors,
        first=index == 0,
    )


def _heads(source: Source) -> tuple[int, int]:
    """Number and width of the heads."""
    size = source.read.integer("wkv.head_size")
    if source.width % size:
        raise ModelFileError(
            f"metadata key {source.name}.wkv.head_size is {size}; allowed is a number that divides embedding_length "
            f"{source.width}"
        )
    return source.width // size, size


def _channel_mix(source: Source) -> bool:
    ffn = source.architecture.ffn
    return ffn is not None and ffn.channel_mix
