"""What the kernels of Mamba layers are built for; needs no GPU. Letters as in mamba.py. Must not know of models."""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.recurrent.convolution import ConvShape
from engine.cuda.recurrent.plan import Job, StateShape

_SCAN_FILES = ("recurrent.cuh", "scan.cu")

THREADS = 128
"""Of a block of the scans."""

MAX_STATES = 256
"""Largest N: a warp holds all states of a channel."""


@dataclass(frozen=True)
class MambaShape(StateShape):
    """What kernels are built for.

    Attributes:
        d_inner: channels, E.
        d_state: states of a channel, N, at most MAX_STATES.
        d_conv: width of the convolution, W.
        dt_rank: columns in front of B and C in the product of ssm_x.
    """

    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int

    def __post_init__(self) -> None:
        assert 1 <= self.d_state <= MAX_STATES, self

    @property
    def conv(self) -> ConvShape:
        """The convolution, over the first half of a row of the first product."""
        return ConvShape(self.d_inner, self.d_conv, 2 * self.d_inner)

    @property
    def row_width(self) -> int:
        """Columns of the product of ssm_x: dt, B and C."""
        return self.dt_rank + 2 * self.d_state

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """One row of conv_state and of ssm_state."""
        return (*self.conv.state_shapes, (self.d_inner, self.d_state))

    @property
    def channels(self) -> int:
        """Channels of a block of the scans."""
        padded = max(4, 1 << (self.d_state - 1).bit_length())
        return THREADS * (4 if padded <= 128 else padded // 32) // padded

    def build_jobs(self) -> list[Job]:
        """The convolution and the scan, each for decode steps and prompts."""
        vectors = all(width % 4 == 0 for width in (self.dt_rank, self.d_state))
        scan: dict[str, object] = {"D_STATE": self.d_state, "VECTORS": "true" if vectors else "false"}
        return [*self.conv.build_jobs(), (_SCAN_FILES, scan)]
