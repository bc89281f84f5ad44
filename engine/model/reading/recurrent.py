"""Recurrent mixers of a model's layers, from metadata."""

from __future__ import annotations

from engine.model.config import MambaConfig
from engine.model.reading.source import Source


def read_mamba(source: Source) -> MambaConfig:
    """The keys PREFIX.ssm.* of Mamba 1."""
    read = source.read
    return MambaConfig(
        inner=read.integer("ssm.inner_size"),
        state=read.integer("ssm.state_size"),
        conv_width=read.integer("ssm.conv_kernel", low=2, high=256),
        dt_rank=read.integer("ssm.time_step_rank"),
        norm_dt_b_c=read.flag("ssm.dt_b_c_rms", False),
    )
