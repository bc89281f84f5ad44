"""What the kernels of Mamba layers are built for, and how batches of prompts are cut for them; needs no GPU.

Letters as in mamba.py. Must not know of models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Job = tuple[tuple[str, ...], dict[str, object]]
"""Kernel files and defines, for compiler.prebuild."""

_CONV_FILES = ("recurrent.cuh", "conv.cu")
_SCAN_FILES = ("recurrent.cuh", "scan.cu")
TILE = 8
"""Rows of a block of the prompts' convolution."""

THREADS = 128
"""Of a block of every kernel."""

MAX_STATES = 256
"""Largest N: a warp holds all states of a channel."""

MAX_CONV = TILE
"""Largest W: only the first tile of a span reads the state."""


@dataclass(frozen=True)
class MambaShape:
    """What kernels are built for.

    Attributes:
        d_inner: channels, E.
        d_state: states of a channel, N, at most MAX_STATES.
        d_conv: width of the convolution, W, 2 to MAX_CONV.
        dt_rank: columns in front of B and C in the product of ssm_x.
    """

    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int

    def __post_init__(self) -> None:
        assert 1 <= self.d_state <= MAX_STATES and 2 <= self.d_conv <= MAX_CONV, self

    @property
    def row_width(self) -> int:
        """Columns of the product of ssm_x: dt, B and C."""
        return self.dt_rank + 2 * self.d_state

    @property
    def state_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """One row of conv_state and of ssm_state."""
        return (self.d_inner, self.d_conv - 1), (self.d_inner, self.d_state)

    @property
    def state_bytes(self) -> int:
        """Bytes of both."""
        return sum(4 * rows * columns for rows, columns in self.state_shapes)

    @property
    def wide(self) -> int:
        """Channels of a thread of the convolution."""
        return 4 if self.d_inner % 4 == 0 else 1

    @property
    def channels(self) -> int:
        """Channels of a block of the scans."""
        padded = max(4, 1 << (self.d_state - 1).bit_length())
        return THREADS * (4 if padded <= 128 else padded // 32) // padded


def build_jobs(shape: MambaShape) -> list[Job]:
    """The convolution and the scan, each for decode steps and prompts."""
    vectors = all(width % 4 == 0 for width in (shape.dt_rank, shape.d_state))
    return [
        (_CONV_FILES, {"D_CONV": shape.d_conv, "WIDE": shape.wide}),
        (_SCAN_FILES, {"D_STATE": shape.d_state, "VECTORS": "true" if vectors else "false"}),
    ]


def span_table(spans: Iterable[tuple[int, int, int, int, int]]) -> npt.NDArray[np.int32]:
    """Spans of a prompt batch as the kernels read them: int32 (S, 5).

    Args:
        spans: (row, n_rows, n_past, read, write) each: n_rows >= 1 consecutive tokens of one sequence from position
            n_past on, starting at batch row `row`; the rows of states that are read and written, which may be the same.
            Without a past nothing is read. No other span of the batch may name the row that one writes.
    """
    table = np.array(list(spans), np.int32).reshape(-1, 5)
    assert (table[:, 1] >= 1).all(), "a span without rows"
    assert len(np.unique(table[:, 4])) == len(table), "two spans write the same state"
    return table


def conv_tiles(table: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Cuts the spans of span_table into tiles for Mamba.conv_prompt: int32 (n_tiles, 2), span and first row in it."""
    tiles = [(span, first) for span, row in enumerate(table) for first in range(0, int(row[1]), TILE)]
    return np.array(tiles, np.int32).reshape(-1, 2)
