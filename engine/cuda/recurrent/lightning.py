"""Launcher of lightning attention behind the first product of a layer. It is the kernels' contract.

Letters: T rows, H heads of S columns, Z rows of states. Source: MiniMax-01 (arXiv 2501.08313). Every array is a float32
CuPy array. Must not know of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.recurrent.plan import Job, StateShape
from engine.cuda.recurrent.rows import DecodeRows, Rows

_FILES = ("recurrent.cuh", "lightning.cu")

THREADS = 256
"""Of a block."""

VALUES = 32
"""Columns of a head that a block computes."""

MAX_COLUMNS = 256
"""Largest S: a lane holds an eighth of the keys of a value."""


@dataclass(frozen=True)
class LightningShape(StateShape):
    """What kernels are built for, and are launched with.

    Attributes:
        heads: H. head: S, at most MAX_COLUMNS.
        row: floats of a row of the first product, which begins with q, k and v of each head.
    """

    heads: int
    head: int
    row: int

    def __post_init__(self) -> None:
        assert 1 <= self.head <= MAX_COLUMNS and self.row >= 3 * self.inner, self

    @property
    def inner(self) -> int:
        """Numbers of all heads."""
        return self.heads * self.head

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The memories (H, S values, S keys)."""
        return ((self.heads, self.head, self.head),)

    def build_jobs(self) -> list[Job]:
        """The one file."""
        return [(_FILES, {"HEAD": self.head})]


class Lightning:
    """The kernels of one shape of layers on the current device."""

    def __init__(self, shape: LightningShape) -> None:
        self.shape = shape
        ((files, defines),) = shape.build_jobs()
        module = build(files, defines=defines)
        self._decode, self._prompt = module.get("lightning_decode"), module.get("lightning_prompt")

    def __call__(
        self,
        rows: Rows,
        mixed: DeviceArray,
        decay: DeviceArray,
        memory: DeviceArray,
        out: DeviceArray,
        *,
        stream: Stream | None = None,
    ) -> None:
        """out (T, H * S): what lightning.cu says. Rows that the step does not name stay as they are.

        Args:
            rows: of the step.
            mixed: (T, shape.row), contiguous, the first product.
            decay: (H,), what a memory is multiplied by at each token.
            memory: (Z, H, S, S), contiguous, values outermost.
            out: (T, H * S), contiguous, apart from the inputs.
            stream: the current stream when left out.

        Decode kernels read states before their wait; see Convolution.
        """
        shape = self.shape
        assert mixed.shape[1] == shape.row and out.shape[1] == shape.inner and decay.shape == (shape.heads,)
        assert (memory.shape[1:],) == shape.state_shapes
        assert all(array.flags.c_contiguous for array in (mixed, decay, memory, out))
        before, after = (mixed, shape.row, decay, memory), (out, shape.heads)
        blocks = shape.heads * -(-shape.head // VALUES)
        if isinstance(rows, DecodeRows):
            assert min(len(mixed), len(out)) >= rows.count and rows.fit(memory)
            moved = rows.places, rows.positions, rows.offsets
            launch(self._decode, (blocks, rows.count), THREADS, (*before, *moved, *after), stream=stream)
        elif len(rows.spans):
            launch(self._prompt, (blocks, len(rows.spans)), THREADS, (*before, rows.spans, *after), stream=stream)
