"""Launcher of gated delta rules behind the first products of a layer. It is the kernels' contract.

Letters: T rows, H value heads and K key heads of S columns, C = (2 * K + H) * S channels of the convolution of width W,
Z rows of states. Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464); with a decay for every
key "Kimi Linear" (arXiv 2510.26692). Every array is a float32 CuPy array. Must not know of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import Argument, DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.recurrent.convolution import Convolution, ConvShape
from engine.cuda.recurrent.plan import RECORD, WALK_THREADS, WALK_VALUES, Job, StateShape
from engine.cuda.recurrent.rows import DecodeRows, Rows

_FILES = ("recurrent.cuh", "convolution.cuh", "delta.cu")
_CHUNK_FILES = ("recurrent.cuh", "chunk_walk.cuh", "delta_chunks.cu")

DECODE_THREADS, THREADS = 512, 128
"""Of a block in decode steps, and of the other kernels."""

VALUES = 32
"""Columns of a head that a block of prompts computes."""

MAX_HEAD = 128
"""Largest S: a lane holds an eighth of the keys of a value."""


@dataclass(frozen=True)
class DeltaShape(StateShape):
    """What kernels are built for, and are launched with.

    Attributes:
        heads: H. key_heads: K, a divisor of H. head: S, at most MAX_HEAD.
        d_conv: W. row: floats of a row of the first product, which begins with the inputs of the convolution.
        grouped: value head h reads key head h // (H / K), else h mod K.
        key_decays: one decay for every key of a head.
        sigmoid_gate: gates by sigmoid, not silu.
        floor: the least logarithm of a decay, below 0; 0: none, which is another formula.
        unit_epsilon: added to the squared lengths of q and k; None: that of the norm.
    """

    heads: int
    key_heads: int
    head: int
    d_conv: int
    row: int
    grouped: bool
    key_decays: bool
    sigmoid_gate: bool
    floor: float = 0.0
    unit_epsilon: float | None = None

    def __post_init__(self) -> None:
        assert self.floor <= 0.0, self
        assert 1 <= self.head <= MAX_HEAD and self.heads % self.key_heads == 0, self

    @property
    def inner(self) -> int:
        """Numbers of all value heads."""
        return self.heads * self.head

    @property
    def convolved(self) -> int:
        """C."""
        return (2 * self.key_heads + self.heads) * self.head

    @property
    def conv(self) -> ConvShape:
        """The convolution of prompts; decode steps have it in the same kernel as the rest."""
        return ConvShape(self.convolved, self.d_conv, self.row)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The convolution's last inputs, and the memories (H, S values, S keys)."""
        return (*self.conv.state_shapes, (self.heads, self.head, self.head))

    @property
    def prompt_blocks(self) -> int:
        """Blocks of a head in prompts."""
        return -(-self.head // VALUES)

    @property
    def chunk_width(self) -> int:
        """See StateShape.chunk_width."""
        own_keys = self.key_heads == self.heads and self.grouped
        if self.head % 4 or (self.key_decays and not own_keys):
            return 0
        return self.heads * (RECORD + 2 * self.head * self.key_decays)

    def build_jobs(self) -> list[Job]:
        """The convolution, everything else, and chunks where heads fit."""
        epsilon = 0.0 if self.unit_epsilon is None else self.unit_epsilon
        both: dict[str, object] = {"HEAD": self.head, "KIMI": int(self.key_decays)}
        both |= {"FLOOR": f"{float(self.floor)!r}f", "UNIT_EPSILON": f"{float(epsilon)!r}f"}
        one: dict[str, object] = {"D_CONV": self.d_conv, "OPEN": int(self.sigmoid_gate)}
        jobs: list[Job] = [*self.conv.build_jobs(), (_FILES, both | one)]
        if self.chunk_width:
            jobs.append((_CHUNK_FILES, both))
        return jobs


@dataclass(frozen=True, eq=False)
class DeltaConstants:
    """Small arrays of a layer: conv (C, W), dt_bias (H,) or with key_decays (H * S,), a (H,), norm (S,).

    epsilon is that of the norm, and of the lengths of q and k where the shape states none.
    """

    conv: DeviceArray
    dt_bias: DeviceArray
    a: DeviceArray
    norm: DeviceArray
    epsilon: float


@dataclass(frozen=True, eq=False)
class DeltaInputs:
    """What a token's products gave, all (T, .) with contiguous rows.

    Attributes:
        mixed: (T, shape.row), contiguous. gate: (T, H * S).
        beta: (T, H) before the sigmoid. steps: (T, H) or with key_decays (T, H * S), before the softplus.
    """

    mixed: DeviceArray
    gate: DeviceArray
    beta: DeviceArray
    steps: DeviceArray


class Delta:
    """The kernels of one shape of layers on the current device."""

    def __init__(self, shape: DeltaShape) -> None:
        self.shape = shape
        self._convolve = Convolution(shape.conv)
        files, defines = shape.build_jobs()[1]
        module = build(files, defines=defines)
        names = "delta_decode", "delta_prompt", "delta_finish"
        self._decode, self._prompt, self._finish = (module.get(name) for name in names)

    def __call__(
        self,
        rows: Rows,
        inputs: DeltaInputs,
        constants: DeltaConstants,
        conv_state: DeviceArray,
        memory: DeviceArray,
        convolved: DeviceArray,
        out: DeviceArray,
        *,
        chunked: DeviceArray | None = None,
        stream: Stream | None = None,
    ) -> None:
        """out (T, H * S): what delta.cu says.

        One launch in decode steps; in prompts the convolution, then each span token after token, or chunk after chunk,
        then norms and gates. Rows that the step does not name stay as they are, but for norms and gates of prompts.

        Args:
            rows: of the step.
            inputs: of the tokens.
            constants: of the layer.
            conv_state: (Z, C, W - 1), contiguous, oldest input first.
            memory: (Z, H, S, S), contiguous, values outermost.
            convolved: (T, C), contiguous, overwritten by prompts.
            out: (T, H * S), contiguous, apart from the inputs.
            chunked: (T, shape.chunk_width), contiguous, overwritten: prompts go in chunks, on compute capability 8.0 or
                newer. None: token after token.
            stream: the current stream when left out.

        Decode kernels read states before their wait; see Convolution.
        """
        shape, mixed = self.shape, inputs.mixed
        assert mixed.shape[1] == shape.row and out.shape[1] == inputs.gate.shape[1] == shape.inner
        assert (conv_state.shape[1:], memory.shape[1:]) == shape.state_shapes
        assert all(array.flags.c_contiguous for array in (mixed, conv_state, memory, convolved, out))
        gate, beta, steps = ((one, one.strides[0] // 4) for one in (inputs.gate, inputs.beta, inputs.steps))
        after = out, shape.heads, shape.key_heads, int(shape.grouped)
        norm, epsilon = constants.norm, float(constants.epsilon)
        if isinstance(rows, DecodeRows):
            assert min(len(mixed), len(out)) >= rows.count and rows.fit(conv_state) and rows.fit(memory)
            args: tuple[Argument, ...] = (
                mixed,
                shape.row,
                constants.conv,
                *gate,
                *beta,
                *steps,
                constants.dt_bias,
                constants.a,
                norm,
                epsilon,
                conv_state,
                memory,
                rows.places,
                rows.positions,
                rows.offsets,
                *after,
            )
            launch(self._decode, (shape.heads, rows.count), DECODE_THREADS, args, stream=stream)
        elif len(rows.spans):
            self._convolve(rows, mixed, constants.conv, None, conv_state, convolved, stream=stream)
            small = *beta, *steps, constants.dt_bias, constants.a, epsilon
            grid = shape.heads * shape.prompt_blocks, len(rows.spans)
            if chunked is None:
                args = (convolved, *small, memory, rows.spans, *after)
                launch(self._prompt, grid, THREADS, args, stream=stream)
            else:
                assert chunked.shape[1] == shape.chunk_width and chunked.flags.c_contiguous, chunked.shape
                files, defines = shape.build_jobs()[-1]
                module, threads = build(files, defines=defines), WALK_THREADS
                args = (convolved, *small, rows.spans, rows.chunks, chunked, *after[1:])
                launch(module.get("delta_chunks"), (shape.heads, len(rows.chunks)), threads, args, stream=stream)
                args = (convolved, chunked, memory, rows.spans, *after)
                grid = shape.heads * -(-shape.head // WALK_VALUES), len(rows.spans)
                launch(module.get("delta_walk"), grid, threads, args, stream=stream)
            warps = len(out) * shape.heads
            finish = out, *gate, norm, epsilon, len(out), shape.heads
            launch(self._finish, -(-warps // (THREADS // 32)), THREADS, finish, stream=stream)
