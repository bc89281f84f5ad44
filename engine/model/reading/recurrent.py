"""Recurrent mixers of a model's layers, from metadata."""

from __future__ import annotations

from engine.errors import ModelFileError
from engine.model.config import (
    DeltaNetConfig,
    KimiDeltaConfig,
    LightningConfig,
    Mamba2Config,
    MambaConfig,
    Plamo2Config,
    RecurrentConfig,
    ShortConvConfig,
)
from engine.model.parts import Recurrence, RecurrentParts
from engine.model.reading.metadata import LIMIT
from engine.model.reading.rwkv import read_rwkv_6, read_rwkv_7
from engine.model.reading.source import Source

WIDEST = 256
"""Most inputs that a convolution may read."""

LEAST_PLAMO_RANK = 64
"""PLaMo 2 has steps of rank D / 16, and at least this."""


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
    if parts.kind is Recurrence.LIGHTNING:
        return _lightning(source, index)
    if parts.kind is Recurrence.PLAMO_2:
        return _plamo_2(source)
    return _kimi_delta(source, parts)


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
        sigmoid_gate=parts.sigmoid_gate,
    )


def _plamo_2(source: Source) -> Plamo2Config:
    read = source.read
    inner, heads = read.integer("ssm.inner_size"), read.integer("ssm.time_step_rank")
    if inner % heads:
        raise ModelFileError(
            f"ssm.inner_size is {inner} with {heads} heads (ssm.time_step_rank); allowed is a multiple of the heads"
        )
    return Plamo2Config(
        inner=inner,
        state=read.integer("ssm.state_size"),
        conv_width=_conv_width(source, "ssm.conv_kernel"),
        heads=heads,
        dt_rank=max(LEAST_PLAMO_RANK, source.width // 16),
    )


def _kimi_delta(source: Source, parts: RecurrentParts) -> KimiDeltaConfig:
    # Files may state 0 heads for the recurrent layers, which have as many as the others.
    heads = source.read.per_layer("attention.head_count", source.n_blocks, low=0)
    if not any(heads):
        raise ModelFileError("attention.head_count is 0 in all layers; allowed is at least 1")
    return KimiDeltaConfig(
        heads=max(heads),
        head_width=source.read.integer("kda.head_dim"),
        conv_width=_conv_width(source, "ssm.conv_kernel"),
        decay_floor=_decay_floor(source) if parts.decay_floor else None,
        unit_epsilon=parts.unit_epsilon,
    )


def _lightning(source: Source, index: int) -> LightningConfig:
    heads = source.read.per_layer("attention.head_count", source.n_blocks, low=1)[index]
    default = max(1, source.width // heads)
    widths = [source.read.integer(f"attention.{which}_length", default) for which in ("key", "value")]
    if widths[0] != widths[1]:
        raise ModelFileError(
            f"attention.key_length is {widths[0]} and attention.value_length {widths[1]}; lightning attention needs "
            "the same width for both"
        )
    # Early layers forget fast, the last one hardly at all.
    rate = 1.0 - index / max(1, source.n_layers - 1) + 1e-5
    return LightningConfig(heads=heads, head_width=widths[0], rate=rate)


def _decay_floor(source: Source) -> float | None:
    """The least logarithm of a decay; None where the file states none, which it may write as minus infinity."""
    key = "kda.gate_lower_bound"
    if not source.read.is_finite(key):
        return None
    return source.read.number(key, low=-LIMIT, high=0.0) or None


def _conv_width(source: Source, key: str) -> int:
    return source.read.integer(key, low=2, high=WIDEST)
