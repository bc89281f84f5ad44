"""Weights of recurrent mixers."""

from __future__ import annotations

from engine.model.building.source import TensorSource
from engine.model.config import MambaConfig
from engine.model.weights import MambaWeights, Norm


def build_mamba(source: TensorSource, prefix: str, mamba: MambaConfig) -> MambaWeights:
    """A Mamba 1 layer."""
    tensors, width, inner = source.tensors, source.width, mamba.inner
    norm = Norm(source.config.norm, source.config.norm_epsilon, None) if mamba.norm_dt_b_c else None
    return MambaWeights(
        ssm_in=source.linear(f"{prefix}.ssm_in", 2 * inner, width),
        conv1d=tensors.vector(f"{prefix}.ssm_conv1d.weight", (inner, mamba.conv_width)),
        conv1d_bias=tensors.vector(f"{prefix}.ssm_conv1d.bias", (inner,)),
        ssm_x=source.linear(f"{prefix}.ssm_x", mamba.dt_rank + 2 * mamba.state, inner),
        ssm_dt=source.linear(f"{prefix}.ssm_dt", inner, mamba.dt_rank),
        a=tensors.vector(f"{prefix}.ssm_a", (inner, mamba.state)),
        d=tensors.vector(f"{prefix}.ssm_d", (inner,)),
        ssm_out=source.linear(f"{prefix}.ssm_out", width, inner),
        dt_b_c_norm=norm,
    )
