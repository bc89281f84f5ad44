"""Launcher of the causal convolutions of recurrent layers. It is the kernels' contract.

Letters: T rows, C channels, W width of the convolution, Z rows of states.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import Argument, DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.recurrent.plan import Job, StateShape
from engine.cuda.recurrent.rows import TILE, DecodeRows, Rows

_FILES = ("recurrent.cuh", "convolution.cuh", "conv.cu")
THREADS = 128
"""Of a block."""

MAX_CONV = TILE
"""Largest W: only the first tile of a span reads the state."""


@dataclass(frozen=True)
class ConvShape(StateShape):
    """What the kernels are built for.

    Attributes:
        channels: C. width: W, 2 to MAX_CONV.
        row: floats of a row of inputs. first: column where they begin.
        gated: a row is [b, c, u]: inputs are b * u, and the result is multiplied by c. Else the result is silu of the
            convolution.
    """

    channels: int
    width: int
    row: int
    first: int = 0
    gated: bool = False

    def __post_init__(self) -> None:
        assert 2 <= self.width <= MAX_CONV, self
        assert self.row >= self.first + self.channels * (3 if self.gated else 1), self

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The last inputs of each channel, oldest first."""
        return ((self.channels, self.width - 1),)

    @property
    def wide(self) -> int:
        """Channels of a thread."""
        return 1 if any(number % 4 for number in (self.channels, self.row, self.first)) else 4

    def build_jobs(self) -> list[Job]:
        """Decode steps and prompts together."""
        return [(_FILES, {"D_CONV": self.width, "WIDE": self.wide, "GATED": int(self.gated)})]


class Convolution:
    """The kernels of one shape on the current device."""

    def __init__(self, shape: ConvShape) -> None:
        (files, defines), self.shape = shape.build_jobs()[0], shape
        module = build(files, defines=defines)
        self._decode, self._prompt = module.get("conv_decode"), module.get("conv_prompt")
        self._blocks = -(-shape.channels // (THREADS * shape.wide))

    def __call__(
        self,
        rows: Rows,
        x: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray | None,
        state: DeviceArray,
        out: DeviceArray,
        *,
        stream: Stream | None = None,
    ) -> None:
        """out (T, C) = what ConvShape says of rows of x; keeps the last W - 1 inputs.

        Args:
            rows: of the step; rows that it does not name, or with position -1, stay as they are.
            x: float32 (T, shape.row), contiguous.
            weight: float32 (C, W), the newest input's last.
            bias: float32 (C,) or None.
            state: float32 (Z, C, W - 1), contiguous.
            out: float32 (T, C), contiguous, written.
            stream: the current stream when left out.

        Decode kernels are started early (programmatic dependent launch): positions, offsets and states are read before
        the wait, so the first kernel of a step must not be launched early.
        """
        shape = self.shape
        assert x.shape[1] == shape.row and out.shape[1] == shape.channels, (x.shape, out.shape)
        assert x.flags.c_contiguous and out.flags.c_contiguous and state.flags.c_contiguous
        assert state.shape[1:] == shape.state_shapes[0], state.shape
        inputs = x[:, shape.first :] if shape.first else x
        before, after = (inputs, shape.row, weight, bias, state), (out, shape.channels)
        if isinstance(rows, DecodeRows):
            assert min(len(x), len(out)) >= rows.count and rows.fit(state)
            args: tuple[Argument, ...] = (*before, rows.places, rows.positions, rows.offsets, *after)
            launch(self._decode, (self._blocks, rows.count), THREADS, args, stream=stream)
        elif len(rows.tiles):
            args = (*before, rows.spans, rows.tiles, *after)
            launch(self._prompt, (self._blocks, len(rows.tiles)), THREADS, args, stream=stream)
