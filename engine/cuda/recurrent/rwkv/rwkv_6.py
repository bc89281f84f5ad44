"""Launcher of RWKV-6's time mixing behind its products. It is the kernels' contract.

Letters: T rows, H heads of S columns, K heads of keys and values, Z rows of states. Source: Peng et al., "Eagle and
Finch" (arXiv 2404.05892). Every array is a float32 CuPy array. Must not know of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.recurrent.plan import Job
from engine.cuda.recurrent.rows import DecodeRows, Rows
from engine.cuda.recurrent.rwkv.shape import DECODE_THREADS, THREADS, TimeMixShape

_FILES = ("recurrent.cuh", "rwkv_head.cuh", "rwkv_6.cu")


@dataclass(frozen=True)
class Rwkv6Shape(TimeMixShape):
    """See TimeMixShape.

    Attributes:
        kv_heads: K, a divisor of H. linear: see engine.model.config.Rwkv6Config.linear_attention.
    """

    kv_heads: int
    linear: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.heads % self.kv_heads == 0, self

    def build_jobs(self) -> list[Job]:
        """The one file."""
        return [(_FILES, {"HEAD": self.head, "LINEAR": int(self.linear)})]


@dataclass(frozen=True, eq=False)
class Rwkv6Constants:
    """Small arrays of a layer: first, norm and bias (H * S,); None with linear attention. epsilon: of the norm."""

    first: DeviceArray | None
    norm: DeviceArray | None
    bias: DeviceArray | None
    epsilon: float


@dataclass(frozen=True, eq=False)
class Rwkv6Inputs:
    """What a token's products gave, contiguous rows of one stride: r, w, gate (T, H * S), k, v (T, K * S).

    w is the decay before both of its exponential functions, and the gate before its activation.
    """

    r: DeviceArray
    w: DeviceArray
    k: DeviceArray
    v: DeviceArray
    gate: DeviceArray


class Rwkv6:
    """The kernels of one shape of layers on the current device."""

    def __init__(self, shape: Rwkv6Shape) -> None:
        self.shape = shape
        ((files, defines),) = shape.build_jobs()
        module = build(files, defines=defines)
        names = "rwkv_6_decode", "rwkv_6_prompt", "rwkv_6_finish"
        self._decode, self._prompt, self._finish = (module.get(name) for name in names)

    def __call__(
        self,
        rows: Rows,
        inputs: Rwkv6Inputs,
        constants: Rwkv6Constants,
        memory: DeviceArray,
        out: DeviceArray,
        *,
        stream: Stream | None = None,
    ) -> None:
        """out (T, H * S): what rwkv_6.cu says. One launch in decode steps, in prompts one more for norms and gates.

        Rows that the step does not name stay as they are, but for norms and gates of prompts.

        Args:
            rows: of the step.
            inputs: of the tokens.
            constants: of the layer.
            memory: (Z, H, S, S), contiguous, values outermost.
            out: (T, H * S), contiguous, apart from the inputs.
            stream: the current stream when left out.

        Decode kernels read memories before their wait; see Convolution.
        """
        shape, stride = self.shape, inputs.r.strides[0] // 4
        given = inputs.r, inputs.w, inputs.k, inputs.v
        assert all(array.strides == inputs.r.strides for array in (*given, inputs.gate))
        assert inputs.k.shape[1] == shape.kv_heads * shape.head and inputs.r.shape[1] == out.shape[1] == shape.inner
        assert memory.shape[1:] == shape.state_shapes[1] and memory.flags.c_contiguous and out.flags.c_contiguous
        norm = constants.norm, constants.bias, float(constants.epsilon)
        heads = shape.heads, shape.kv_heads
        if isinstance(rows, DecodeRows):
            assert min(len(inputs.r), len(out)) >= rows.count and rows.fit(memory)
            moved = memory, rows.places, rows.positions, rows.offsets
            args = (*given, inputs.gate, stride, constants.first, *norm, *moved, out, *heads)
            launch(self._decode, (shape.heads, rows.count), DECODE_THREADS, args, stream=stream)
        elif len(rows.spans):
            walk = (*given, stride, constants.first, memory, rows.spans, out, *heads)
            launch(self._prompt, (shape.prompt_blocks, len(rows.spans)), THREADS, walk, stream=stream)
            last = out, inputs.gate, stride, *norm, len(out), shape.heads
            launch(self._finish, shape.finish_blocks(len(out)), THREADS, last, stream=stream)
