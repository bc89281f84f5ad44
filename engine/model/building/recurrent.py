"""Weights of recurrent mixers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from engine.model.building.rwkv import build_rwkv_6, build_rwkv_7
from engine.model.building.source import TensorSource
from engine.model.config import (
    DeltaNetConfig,
    KimiDeltaConfig,
    LightningConfig,
    Mamba2Config,
    MambaConfig,
    Plamo2Config,
    RecurrentConfig,
    Rwkv6Config,
    Rwkv7Config,
    ShortConvConfig,
)
from engine.model.rope import alibi_slopes
from engine.model.weights import (
    DeltaNetWeights,
    KimiDeltaWeights,
    LightningWeights,
    Linear,
    Mamba2Weights,
    MambaWeights,
    Norm,
    Plamo2Weights,
    RecurrentWeights,
    ShortConvWeights,
    Weight,
)

LARGEST_SLOPE = 8.0
"""Of lightning attention, as rope.alibi_slopes takes it."""


def build_recurrent(source: TensorSource, prefix: str, mixer: RecurrentConfig) -> RecurrentWeights:
    """The recurrent mixer of the layer whose tensors' names begin with `prefix`."""
    if isinstance(mixer, ShortConvConfig):
        return _short_conv(source, prefix, mixer)
    if isinstance(mixer, MambaConfig):
        return _mamba(source, prefix, mixer)
    if isinstance(mixer, Mamba2Config):
        return _mamba_2(source, prefix, mixer)
    if isinstance(mixer, DeltaNetConfig):
        return _delta_net(source, prefix, mixer)
    if isinstance(mixer, LightningConfig):
        return _lightning(source, prefix, mixer)
    if isinstance(mixer, Plamo2Config):
        return _plamo_2(source, prefix, mixer)
    if isinstance(mixer, Rwkv6Config):
        return build_rwkv_6(source, prefix, mixer)
    if isinstance(mixer, Rwkv7Config):
        return build_rwkv_7(source, prefix, mixer)
    assert isinstance(mixer, KimiDeltaConfig)
    return _kimi_delta(source, prefix, mixer)


def _short_conv(source: TensorSource, prefix: str, config: ShortConvConfig) -> ShortConvWeights:
    inner = config.inner
    return ShortConvWeights(
        in_proj=source.linear(f"{prefix}.shortconv.in_proj", 3 * inner, source.width),
        conv=source.tensors.vector(f"{prefix}.shortconv.conv.weight", (inner, config.conv_width)),
        out_proj=source.linear(f"{prefix}.shortconv.out_proj", source.width, inner),
    )


def _mamba(source: TensorSource, prefix: str, mamba: MambaConfig) -> MambaWeights:
    tensors, width, inner = source.tensors, source.width, mamba.inner
    norms: list[Norm | None] = [None] * 3
    if mamba.norm_weights:
        widths = {"dt": mamba.dt_rank, "b": mamba.state, "c": mamba.state}
        norms = [source.norm(f"{prefix}.ssm_{part}_norm", (size,)) for part, size in widths.items()]
    elif mamba.norm_dt_b_c:
        norms = [Norm(source.config.norm, source.config.norm_epsilon, None)] * 3
    return MambaWeights(
        ssm_in=source.linear(f"{prefix}.ssm_in", 2 * inner, width),
        conv1d=tensors.vector(f"{prefix}.ssm_conv1d.weight", (inner, mamba.conv_width)),
        conv1d_bias=tensors.vector(f"{prefix}.ssm_conv1d.bias", (inner,)),
        ssm_x=source.linear(f"{prefix}.ssm_x", mamba.dt_rank + 2 * mamba.state, inner),
        ssm_dt=source.linear(f"{prefix}.ssm_dt", inner, mamba.dt_rank),
        a=tensors.vector(f"{prefix}.ssm_a", (inner, mamba.state)),
        d=tensors.vector(f"{prefix}.ssm_d", (inner,)),
        ssm_out=source.linear(f"{prefix}.ssm_out", width, inner),
        dt_norm=norms[0],
        b_norm=norms[1],
        c_norm=norms[2],
    )


def _mamba_2(source: TensorSource, prefix: str, mamba: Mamba2Config) -> Mamba2Weights:
    tensors, inner, heads = source.tensors, mamba.inner, mamba.heads
    return Mamba2Weights(
        ssm_in=source.linear(f"{prefix}.ssm_in", inner + mamba.convolved + heads, source.width),
        conv1d=tensors.vector(f"{prefix}.ssm_conv1d.weight", (mamba.convolved, mamba.conv_width)),
        conv1d_bias=tensors.optional_vector(f"{prefix}.ssm_conv1d.bias", (mamba.convolved,)),
        dt_bias=tensors.vector(f"{prefix}.ssm_dt.bias", (heads,)),
        a=source.tensors.array(f"{prefix}.ssm_a", (heads,)),
        d=source.tensors.array(f"{prefix}.ssm_d", (heads,)),
        norm=source.norm(f"{prefix}.ssm_norm", (mamba.groups, inner // mamba.groups)) if mamba.norm else None,
        ssm_out=source.linear(f"{prefix}.ssm_out", source.width, inner),
    )


def _delta_net(source: TensorSource, prefix: str, config: DeltaNetConfig) -> DeltaNetWeights:
    tensors, width, inner, heads = source.tensors, source.width, config.inner, config.heads
    if tensors.has(f"{prefix}.attn_qkv.weight"):
        qkv = source.linear(f"{prefix}.attn_qkv", config.convolved, width)
        z = source.linear(f"{prefix}.attn_gate", inner, width)
        tensors.ignore((f"{prefix}.ssm_in.*",))  # the same rows in the order of older files
    else:
        both = source.linear(f"{prefix}.ssm_in", config.convolved + inner, width)
        group = 2 * config.head_width + 2 * inner // config.key_heads
        by_group = np.arange(config.key_heads * group).reshape(config.key_heads, group)
        ends = np.cumsum([config.head_width, config.head_width, inner // config.key_heads])
        q, k, v, gate = (part.reshape(-1) for part in np.split(by_group, ends, axis=1))
        qkv, z = _rows(both, np.concatenate((q, k, v)), "q, k, v"), _rows(both, gate, "gate")
    if tensors.has(f"{prefix}.ssm_ba.weight"):
        both = source.linear(f"{prefix}.ssm_ba", 2 * heads, width)
        beta_rows, alpha_rows = np.split(np.arange(2 * heads).reshape(config.key_heads, -1), 2, axis=1)
        beta, alpha = _rows(both, beta_rows.reshape(-1), "beta"), _rows(both, alpha_rows.reshape(-1), "alpha")
    else:
        beta = source.linear(f"{prefix}.ssm_beta", heads, width)
        alpha = source.linear(f"{prefix}.ssm_alpha", heads, width)
    return DeltaNetWeights(
        qkv=qkv,
        z=z,
        beta=beta,
        alpha=alpha,
        conv1d=tensors.vector(f"{prefix}.ssm_conv1d.weight", (config.convolved, config.conv_width)),
        dt_bias=tensors.vector(f"{prefix}.ssm_dt.bias", (heads,)),
        a=tensors.vector(f"{prefix}.ssm_a", (heads,)),
        norm=source.norm(f"{prefix}.ssm_norm", (config.head_width,)),
        ssm_out=source.linear(f"{prefix}.ssm_out", width, inner),
    )


def _plamo_2(source: TensorSource, prefix: str, config: Plamo2Config) -> Plamo2Weights:
    tensors, inner, heads, size, state = source.tensors, config.inner, config.heads, config.head_width, config.state
    ssm_in = source.linear(f"{prefix}.ssm_in", 2 * inner, source.width)
    ssm_x = source.linear(f"{prefix}.ssm_x", 2 * state + config.dt_rank, inner)
    ssm_dt = source.linear(f"{prefix}.ssm_dt", heads, config.dt_rank)
    ends = (2 * state, 2 * state + config.dt_rank), (0, state), (state, 2 * state)
    d, b, c = (ssm_x.slice_rows(*pair) for pair in ends)
    return Plamo2Weights(
        ssm_in=ssm_in,
        conv1d=tensors.vector(f"{prefix}.ssm_conv1d.weight", (inner, config.conv_width)),
        ssm_x=ssm_x,
        ssm_dt=ssm_dt,
        a=source.tensors.array(f"{prefix}.ssm_a", (heads,)),
        d=source.tensors.array(f"{prefix}.ssm_d", (heads,)),
        b_norm=source.norm(f"{prefix}.ssm_b_norm", (config.state,)),
        c_norm=source.norm(f"{prefix}.ssm_c_norm", (config.state,)),
        dt_norm=source.norm(f"{prefix}.ssm_dt_norm", (config.dt_rank,)),
        ssm_out=source.linear(f"{prefix}.ssm_out", source.width, inner),
        u_z=(ssm_in.every(size, size, 2 * size, "u"), ssm_in.every(0, size, 2 * size, "z")),
        d_b_c=(d, b, c),
        each_dt=ssm_dt.repeated(size),
    )


def _kimi_delta(source: TensorSource, prefix: str, config: KimiDeltaConfig) -> KimiDeltaWeights:
    tensors, width, inner, size = source.tensors, source.width, config.inner, config.head_width
    decay_a, decay_b = _low_rank(source, f"{prefix}.ssm_f", inner, size)
    gate_a, gate_b = _low_rank(source, f"{prefix}.ssm_g", inner, size)
    rates, recurrent = tensors.array(f"{prefix}.ssm_a", (config.heads,)), source.architecture.recurrent
    convs = [tensors.array(f"{prefix}.ssm_conv1d_{part}.weight", (inner, config.conv_width)) for part in "qkv"]
    return KimiDeltaWeights(
        q=source.linear(f"{prefix}.attn_q", inner, width),
        k=source.linear(f"{prefix}.attn_k", inner, width),
        v=source.linear(f"{prefix}.attn_v", inner, width),
        beta=source.linear(f"{prefix}.ssm_beta", config.heads, width),
        decay_a=decay_a,
        decay_b=decay_b,
        gate_a=gate_a,
        gate_b=gate_b,
        conv1d=np.concatenate(convs),
        dt_bias=tensors.vector(f"{prefix}.ssm_dt.bias", (inner,)),
        a=-rates if config.decay_floor is not None and recurrent is not None and recurrent.negative_rates else rates,
        norm=source.norm(f"{prefix}.ssm_norm", (size,)),
        output=tensors.linear(f"{prefix}.attn_output", width, inner, scale=False),  # unlike that of attention
    )


def _lightning(source: TensorSource, prefix: str, config: LightningConfig) -> LightningWeights:
    width, inner = source.width, config.inner
    slopes = alibi_slopes(config.heads, LARGEST_SLOPE)
    return LightningWeights(
        qkv=source.linear(f"{prefix}.attn_qkv", 3 * inner, width),
        gate=source.linear(f"{prefix}.attn_gate", inner, width),
        norm=source.norm(f"{prefix}.attn_norm_2", (inner,)),
        output=source.tensors.linear(f"{prefix}.attn_output", width, inner, scale=False),  # unlike that of attention
        decay=np.exp(-np.float32(config.rate) * slopes),
    )


def _low_rank(source: TensorSource, name: str, rows: int, rank: int) -> tuple[Linear, Linear | None]:
    """A projection from D through `rank` numbers as two matrices, or as one where the file has no second."""
    if source.tensors.has(f"{name}.weight"):
        return source.linear(name, rows, source.width), None
    if not source.tensors.has(f"{name}_b.weight"):
        return source.linear(f"{name}_a", rows, source.width), None
    return source.linear(f"{name}_a", rank, source.width), source.linear(f"{name}_b", rows, rank)


def _rows(linear: Linear, rows: npt.NDArray[np.int64], label: str) -> Linear:
    """The projection to these outputs, copied; the label tells it from other rows of the tensor."""
    weight = linear.weight
    picked = Weight(f"{weight.name}[{label}]", weight.type, (len(rows), weight.columns), weight.raw[rows])
    return replace(linear, weight=picked, bias=None if linear.bias is None else linear.bias[rows])
