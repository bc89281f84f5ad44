"""Launcher of RWKV-7's time mixing behind its products. It is the kernels' contract.

Letters: T rows, H heads of S columns, Z rows of states. Source: Peng et al., "RWKV-7 Goose" (arXiv 2503.14456). Every
array is a float32 CuPy array. Must not know of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.recurrent.plan import PAIRED_RECORD, WALK_THREADS, Job
from engine.cuda.recurrent.rows import DecodeRows, PromptRows, Rows
from engine.cuda.recurrent.rwkv.shape import DECODE_THREADS, THREADS, TimeMixShape, check_chunks

_FILES = ("recurrent.cuh", "rwkv_head.cuh", "rwkv_7.cu")
_CHUNK_FILES = ("recurrent.cuh", "chunk_walk.cuh", "rwkv_7_chunks.cu")

MAX_CHUNK_HEAD = 96
"""Most columns of heads that prompts take in chunks: shared memory holds as many keys of a chunk."""


@dataclass(frozen=True)
class Rwkv7Shape(TimeMixShape):
    """See TimeMixShape."""

    @property
    def chunk_width(self) -> int:
        """See StateShape.chunk_width."""
        fits = self.head % 4 == 0 and self.head <= MAX_CHUNK_HEAD
        return self.heads * (PAIRED_RECORD + 2 * self.head) if fits else 0

    def build_jobs(self) -> list[Job]:
        """Everything, and chunks where heads fit."""
        defines: dict[str, object] = {"HEAD": self.head}
        return [(files, defines) for files in (_FILES, _CHUNK_FILES)[: 2 if self.chunk_width else 1]]


@dataclass(frozen=True, eq=False)
class Rwkv7Constants:
    """Small arrays of a layer: k_k, k_a, r_k (H * S,); norm, bias likewise, or None. epsilon: of the norm."""

    k_k: DeviceArray
    k_a: DeviceArray
    r_k: DeviceArray
    norm: DeviceArray | None
    bias: DeviceArray | None
    epsilon: float


@dataclass(frozen=True, eq=False)
class Rwkv7Inputs:
    """What a token's products gave, (T, H * S) each, contiguous rows of one stride.

    Attributes:
        r, w, k, v, a: as rwkv_7.cu names them; prompts overwrite all but r.
        f: how much of the first layer's values is taken; None in that layer. gate: factors of the result, or None.
        u: room for what prompts make of k.
    """

    r: DeviceArray
    w: DeviceArray
    k: DeviceArray
    v: DeviceArray
    a: DeviceArray
    f: DeviceArray | None
    gate: DeviceArray | None
    u: DeviceArray


class Rwkv7:
    """The kernels of one shape of layers on the current device."""

    def __init__(self, shape: Rwkv7Shape) -> None:
        self.shape = shape
        files, defines = shape.build_jobs()[0]
        module = build(files, defines=defines)
        names = "rwkv_7_decode", "rwkv_7_prepare", "rwkv_7_prompt", "rwkv_7_finish"
        self._decode, self._prepare, self._prompt, self._finish = (module.get(name) for name in names)

    def __call__(
        self,
        rows: Rows,
        inputs: Rwkv7Inputs,
        constants: Rwkv7Constants,
        first: DeviceArray,
        memory: DeviceArray,
        out: DeviceArray,
        *,
        chunked: DeviceArray | None = None,
        stream: Stream | None = None,
    ) -> None:
        """out (T, H * S): what rwkv_7.cu says. One launch in decode steps, three in prompts, four in chunks.

        Rows that the step does not name stay as they are, but for inputs, norms and gates of prompts.

        Args:
            rows: of the step.
            inputs: of the tokens.
            constants: of the layer.
            first: (T, H * S), contiguous rows: the first layer's values, written where inputs.f is None.
            memory: (Z, H, S, S), contiguous, values outermost.
            out: (T, H * S), contiguous, apart from the inputs.
            chunked: (T, shape.chunk_width), contiguous, overwritten: prompts go in chunks, on compute capability 8.0 or
                newer. None: token after token.
            stream: the current stream when left out.

        Decode kernels read memories before their wait; see Convolution.
        """
        shape, stride = self.shape, inputs.r.strides[0] // 4
        given = inputs.r, inputs.w, inputs.k, inputs.v, inputs.a, inputs.f, inputs.gate, inputs.u
        for array in given:
            assert array is None or (array.shape[1] == shape.inner and array.strides == inputs.r.strides)
        assert first.shape[1] == out.shape[1] == shape.inner and first.strides[1] == 4 and out.flags.c_contiguous
        assert memory.shape[1:] == shape.state_shapes[1] and memory.flags.c_contiguous
        kept = first, first.strides[0] // 4
        norm = constants.norm, constants.bias, float(constants.epsilon)
        if isinstance(rows, DecodeRows):
            assert min(len(inputs.r), len(out)) >= rows.count and rows.fit(memory)
            moved = memory, rows.places, rows.positions, rows.offsets
            small = constants.k_k, constants.k_a, constants.r_k
            args = (*given[:-1], stride, *kept, *small, *norm, *moved, out, shape.heads)
            launch(self._decode, (shape.heads, rows.count), DECODE_THREADS, args, stream=stream)
        elif len(rows.spans):
            n, blocks, (r, w, k, v, a, f, gate, u) = len(out), shape.finish_blocks(len(out)), given
            assert len(first) >= n
            made = w, k, v, a, f, u, stride, *kept, constants.k_k, constants.k_a, n, shape.heads
            launch(self._prepare, blocks, THREADS, made, stream=stream)
            if chunked is None:
                walk = r, w, k, v, u, a, stride, memory, rows.spans, out, shape.heads
                launch(self._prompt, (shape.prompt_blocks, len(rows.spans)), THREADS, walk, stream=stream)
            else:
                self._in_chunks(rows, inputs, memory, out, chunked, stream)
            last = out, r, k, v, gate, stride, constants.r_k, *norm, n, shape.heads
            launch(self._finish, blocks, THREADS, last, stream=stream)

    def _in_chunks(
        self,
        rows: PromptRows,
        inputs: Rwkv7Inputs,
        memory: DeviceArray,
        out: DeviceArray,
        chunked: DeviceArray,
        stream: Stream | None,
    ) -> None:
        shape, stride = self.shape, inputs.r.strides[0] // 4
        r, w, k, v, u, away = inputs.r, inputs.w, inputs.k, inputs.v, inputs.u, inputs.a
        check_chunks(shape, chunked, r, w, k, v, u, away)
        files, defines = shape.build_jobs()[1]
        module = build(files, defines=defines)
        args = r, w, k, u, away, stride, rows.spans, rows.chunks, chunked, shape.heads
        launch(module.get("rwkv_7_chunks"), (shape.heads, len(rows.chunks)), WALK_THREADS, args, stream=stream)
        walk = w, v, u, away, stride, chunked, memory, rows.spans, out, shape.heads
        launch(module.get("rwkv_7_walk"), (shape.walk_blocks, len(rows.spans)), WALK_THREADS, walk, stream=stream)
