"""Recurrent mixers of a model's layers, from metadata."""

from __future__ import annotations

from engine.errors import ModelFileError
from engine.model.reading.rwkv import read_rwkv_6, read_rwkv_7
from engine.model.reading.source import Source
from engine.model.recurrent_config import (
    DeltaNetConfig,
    KimiDeltaConfig,
    Mamba2Config,
    MambaConfig,
    RecurrentConfig,
    ShortConvConfig,
)
from engine.model.recurrent_parts import Recurrence, RecurrentParts

WIDEST = 256
"""Most inputs that a convolution may read."""


def read_recurrent(source: Source, parts: RecurrentParts, index: int) -> RecurrentConfig:
    """The recurrent mixer of layer `index`.

    Raises:
        ModelFileError: a key is missing or has an impossible value, or sizes contradict each other.
    """
    if parts.kind is Recurrence.SHORT_CONVOLUTION:
        return ShortConvConfig(inner=source.width, conv_width=_conv_width(source, "shortconv.l_cache"))
    if parts.kind is Recurrence.MAMBA:
        return _mamba(source, parts)
    if parts.kind is Recurrence.MAMBA_2:
        return _mamba_2(source, index)
    if parts.kind is Recurrence.DELTA_NET:
        return _delta_net(source, parts)
    if parts.kind is Recurrence.RWKV_6:
        return read_rwkv_6(source, index)
    if parts.kind is Recurrence.RWKV_7:
        return read_rwkv_7(source, index)
    return _kimi_delta(source)


def _mamba(source: Source, parts: RecurrentParts) -> MambaConfig:
    read = source.read
    return MambaConfig(
        inner=read.integer("ssm.inner_size"),
        state=read.integer("ssm.state_size"),
        conv_width=_conv_width(source, "ssm.conv_kernel"),
        dt_rank=read.integer("ssm.time_step_rank"),
        norm_dt_b_c=read.flag("ssm.dt_b_c_rms", False) or parts.norm_weights,
        norm_weights=parts.norm_weights,
    )


def _mamba_2(source: Source, index: int) -> Mamba2Config:
    read = source.read
    inner, heads, groups = (read.integer(f"ssm.{key}") for key in ("inner_size", "time_step_rank", "group_count"))
    if inner % heads or heads % groups:
        raise ModelFileError(
            f"ssm.inner_size {inner}, ssm.time_step_rank {heads} (heads) and ssm.group_count {groups}: each must be a "
            "multiple of the next"
        )
    return Mamba2Config(
        inner=inner,
        state=read.integer("ssm.state_size"),
        conv_width=_conv_width(source, "ssm.conv_kernel"),
        heads=heads,
        groups=groups,
        norm=f"blk.{index}.ssm_norm.weight" in source.tensors,
    )


def _delta_net(source: Source, parts: RecurrentParts) -> DeltaNetConfig:
    read = source.read
    width, heads, key_heads = (read.integer(f"ssm.{key}") for key in ("state_size", "time_step_rank", "group_count"))
    inner = read.integer("ssm.inner_size")
    if heads % key_heads or inner != heads * width:
        raise ModelFileError(
            f"ssm.inner_size is {inner}, with {heads} value heads (ssm.time_step_rank) of {width} numbers "
            f"(ssm.state_size) and {key_heads} key heads (ssm.group_count); allowed is heads · numbers, where the "
            "key heads divide the value heads"
        )
    return DeltaNetConfig(
        key_heads=key_heads,
        heads=heads,
        head_width=width,
        conv_width=_conv_width(source, "ssm.conv_kernel"),
        grouped=parts.grouped_heads,
    )


def _kimi_delta(source: Source) -> KimiDeltaConfig:
    # Files may state 0 heads for the recurrent layers, which have as many as the others.
    heads = source.read.per_layer("attention.head_count", source.n_blocks, low=0)
    if not any(heads):
        raise ModelFileError("attention.head_count is 0 in all layers; allowed is at least 1")
    return KimiDeltaConfig(
        heads=max(heads),
        head_width=source.read.integer("kda.head_dim"),
        conv_width=_conv_width(source, "ssm.conv_kernel"),
    )


def _conv_width(source: Source, key: str) -> int:
    return source.read.integer(key, low=2, high=WIDEST)
