"""Launcher of the state space of Mamba 2 layers behind their first product. It is the kernels' contract.

Letters: T rows, H heads of P channels, E = H * P, N states of a channel, G groups of heads that share B and C, W width
of the convolution over C = E + 2 * G * N channels, Z rows of states. Source: Dao and Gu, "Transformers are SSMs" (arXiv
2405.21060). Every array is a C-contiguous float32 CuPy array. Must not know of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import Argument, DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.recurrent.convolution import Convolution, ConvShape
from engine.cuda.recurrent.plan import RECORD, WALK_THREADS, WALK_VALUES, Job, StateShape
from engine.cuda.recurrent.rows import DecodeRows, Rows

_FILES = ("recurrent.cuh", "convolution.cuh", "mamba_2.cu")
_CHUNK_FILES = ("recurrent.cuh", "chunk_walk.cuh", "mamba_2_chunks.cu")

THREADS = 256
"""Of a block."""

CHANNELS = 32
"""Of a head that a block computes at a time; in decode steps it does up to two turns."""

MAX_STATES = 256
"""Largest N: a lane holds an eighth of a channel's states."""

MAX_CHUNK_STATES = 192
"""Largest N of prompts in chunks: what a block keeps in shared memory."""


@dataclass(frozen=True)
class Mamba2Shape(StateShape):
    """What kernels are built for, and are launched with.

    Attributes:
        heads: H. head: P. groups: G, a divisor of H.
        d_state: N, at most MAX_STATES. d_conv: W.
    """

    heads: int
    head: int
    groups: int
    d_state: int
    d_conv: int

    def __post_init__(self) -> None:
        assert 1 <= self.d_state <= MAX_STATES and self.heads % self.groups == 0, self

    @property
    def inner(self) -> int:
        """E."""
        return self.heads * self.head

    @property
    def convolved(self) -> int:
        """C."""
        return self.inner + 2 * self.groups * self.d_state

    @property
    def row_width(self) -> int:
        """Columns of the first product: z, the inputs of the convolution, and dt."""
        return self.inner + self.convolved + self.heads

    @property
    def conv(self) -> ConvShape:
        """The convolution of prompts; decode steps have it in the same kernel as the rest."""
        return ConvShape(self.convolved, self.d_conv, self.row_width, first=self.inner)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The convolution's last inputs, and the states."""
        return (*self.conv.state_shapes, (self.heads, self.head, self.d_state))

    @property
    def decode_blocks(self) -> int:
        """Blocks of a head in decode steps."""
        return -(-self.head // (CHANNELS * (2 if self.head > CHANNELS else 1)))

    @property
    def prompt_blocks(self) -> int:
        """Blocks of a head in prompts."""
        return -(-self.head // CHANNELS)

    @property
    def chunk_width(self) -> int:
        """See StateShape.chunk_width."""
        fits = self.d_state % 4 == 0 and self.inner % 4 == 0 and self.d_state <= MAX_CHUNK_STATES
        return self.heads * RECORD if fits else 0

    def build_jobs(self) -> list[Job]:
        """The convolution, everything else, and chunks where rows fit."""
        defines: dict[str, object] = {"D_STATE": self.d_state, "HEAD": self.head, "D_CONV": self.d_conv}
        jobs: list[Job] = [*self.conv.build_jobs(), (_FILES, defines)]
        if self.chunk_width:
            jobs.append((_CHUNK_FILES, {"D_STATE": self.d_state, "HEAD": self.head}))
        return jobs


@dataclass(frozen=True, eq=False)
class Mamba2Constants:
    """Small arrays of a layer: conv (C, W), conv_bias (C,) or None; dt_bias, a and d (H,)."""

    conv: DeviceArray
    conv_bias: DeviceArray | None
    dt_bias: DeviceArray
    a: DeviceArray
    d: DeviceArray


class Mamba2:
    """The kernels of one shape of layers on the current device."""

    def __init__(self, shape: Mamba2Shape) -> None:
        self.shape = shape
        self._convolve = Convolution(shape.conv)
        files, defines = shape.build_jobs()[1]
        module = build(files, defines=defines)
        self._decode, self._prompt = module.get("mamba_2_decode"), module.get("mamba_2_prompt")

    def __call__(
        self,
        rows: Rows,
        mixed: DeviceArray,
        constants: Mamba2Constants,
        conv_state: DeviceArray,
        ssm_state: DeviceArray,
        convolved: DeviceArray,
        out: DeviceArray,
        *,
        chunked: DeviceArray | None = None,
        stream: Stream | None = None,
    ) -> None:
        """out (T, E) = (C . h + d * x) * silu(z) behind h = exp(step * a) * h + step * x * B.

        step = softplus(dt + dt_bias).
        One launch in decode steps; in prompts the convolution, then each span token after token, or chunk after chunk.
        Rows that the step does not name stay as they are.

        Args:
            rows: of the step.
            mixed: (T, shape.row_width), the first product.
            constants: of the layer.
            conv_state: (Z, C, W - 1), oldest input first.
            ssm_state: (Z, H, P, N).
            convolved: (T, C), overwritten by prompts.
            out: (T, E), apart from the inputs.
            chunked: (T, shape.chunk_width), overwritten: prompts go in chunks, on compute capability 8.0 or newer.
                None: token after token.
            stream: the current stream when left out.

        Decode kernels read states before their wait; see Convolution.
        """
        shape = self.shape
        assert mixed.shape[1] == shape.row_width and out.shape[1] == shape.inner, (mixed.shape, out.shape)
        assert (conv_state.shape[1:], ssm_state.shape[1:]) == shape.state_shapes
        assert all(array.flags.c_contiguous for array in (mixed, conv_state, ssm_state, convolved, out))
        after = out, shape.heads, shape.groups
        if isinstance(rows, DecodeRows):
            assert min(len(mixed), len(out)) >= rows.count and rows.fit(conv_state) and rows.fit(ssm_state)
            args: tuple[Argument, ...] = (
                mixed,
                shape.row_width,
                constants.conv,
                constants.conv_bias,
                constants.dt_bias,
                constants.a,
                constants.d,
                conv_state,
                ssm_state,
                rows.places,
                rows.positions,
                rows.offsets,
                *after,
            )
            grid = shape.heads * shape.decode_blocks, rows.count
            launch(self._decode, grid, THREADS, args, stream=stream)
        elif len(rows.spans):
            conv = constants.conv, constants.conv_bias, conv_state
            self._convolve(rows, mixed, *conv, convolved, stream=stream)
            small = constants.dt_bias, constants.a
            given = mixed, shape.row_width, convolved
            if chunked is None:
                args = (*given, *small, constants.d, ssm_state, rows.spans, *after)
                grid = shape.heads * shape.prompt_blocks, len(rows.spans)
                launch(self._prompt, grid, THREADS, args, stream=stream)
                return
            assert chunked.shape[1] == shape.chunk_width and chunked.flags.c_contiguous, chunked.shape
            files, defines = shape.build_jobs()[-1]
            module = build(files, defines=defines)
            args = (*given, *small, rows.spans, rows.chunks, chunked, *after[1:])
            launch(module.get("mamba_2_chunks"), (shape.groups, len(rows.chunks)), WALK_THREADS, args, stream=stream)
            args = (*given, constants.d, chunked, ssm_state, rows.spans, *after)
            grid = shape.heads * -(-shape.head // WALK_VALUES), len(rows.spans)
            launch(module.get("mamba_2_walk"), grid, WALK_THREADS, args, stream=stream)
