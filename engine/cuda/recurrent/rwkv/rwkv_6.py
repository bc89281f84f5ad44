"""Launcher of RWKV-6's time mixing behind its products. It is the kernels' contract.

Letters: T rows, H heads of S columns, K heads of keys and values, Z rows of states. Source: Peng et al., "Eagle and
Finch" (arXiv 2404.05892). Every array is a float32 CuPy array. Must not know of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.recurrent.plan import RECORD, WALK_THREADS, Job
from engine.cuda.recurrent.rows import DecodeRows, PromptRows, Rows
from engine.cuda.recurrent.rwkv.shape import DECODE_THREADS, THREADS, TimeMixShape, check_chunks

_FILES = ("recurrent.cuh", "rwkv_head.cuh", "rwkv_6.cuh", "rwkv_6.cu")
_CHUNK_FILES = ("recurrent.cuh", "chunk_walk.cuh", "rwkv_6.cuh", "rwkv_6_chunks.cu")


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

    @property
    def chunk_width(self) -> int:
        """See StateShape.chunk_width."""
        return 0 if self.head % 4 else self.heads * (RECORD + self.head)

    def build_jobs(self) -> list[Job]:
        """Everything, and chunks where heads fit."""
        defines: dict[str, object] = {"HEAD": self.head, "LINEAR": int(self.linear)}
        return [(files, defines) for files in (_FILES, _CHUNK_FILES)[: 2 if self.chunk_width else 1]]


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
        files, defines = shape.build_jobs()[0]
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
        chunked: DeviceArray | None = None,
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
            chunked: (T, shape.chunk_width), contiguous, overwritten: prompts go in chunks, on compute capability 8.0 or
                newer, and overwrite r and w. None: token after token.
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
            if chunked is None:
                walk = (*given, stride, constants.first, memory, rows.spans, out, *heads)
                launch(self._prompt, (shape.prompt_blocks, len(rows.spans)), THREADS, walk, stream=stream)
            else:
                self._in_chunks(rows, inputs, constants, memory, out, chunked, stream)
            last = out, inputs.gate, stride, *norm, len(out), shape.heads
            launch(self._finish, shape.finish_blocks(len(out)), THREADS, last, stream=stream)

    def _in_chunks(
        self,
        rows: PromptRows,
        inputs: Rwkv6Inputs,
        constants: Rwkv6Constants,
        memory: DeviceArray,
        out: DeviceArray,
        chunked: DeviceArray,
        stream: Stream | None,
    ) -> None:
        shape, (r, w, k, v) = self.shape, (inputs.r, inputs.w, inputs.k, inputs.v)
        check_chunks(shape, chunked, r, k, v)
        files, defines = shape.build_jobs()[1]
        module, stride, heads = build(files, defines=defines), r.strides[0] // 4, (shape.heads, shape.kv_heads)
        args = r, w, k, stride, constants.first, rows.spans, rows.chunks, chunked, *heads
        launch(module.get("rwkv_6_chunks"), (shape.heads, len(rows.chunks)), WALK_THREADS, args, stream=stream)
        walk = r, w, v, stride, chunked, memory, rows.spans, out, *heads
        launch(module.get("rwkv_6_walk"), (shape.walk_blocks, len(rows.spans)), WALK_THREADS, walk, stream=stream)
