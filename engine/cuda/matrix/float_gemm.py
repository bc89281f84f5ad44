"""Products of any number of rows with float32 matrices (float_gemm.cu): routers, small projections, models of float32.

Letters: T rows, K columns (inputs), N outputs. Such a matrix would lose too much in float16; here numbers are cut into
two parts of 11 bits. A row's bits depend neither on the other rows, nor on T, nor on the shape of a block. Must not
know of models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from engine.cuda.driver.arrays import Argument, DeviceArray, Stream
from engine.cuda.driver.compiler import build, device_arch, shared_limit
from engine.cuda.driver.launch import launch
from engine.cuda.matrix.linear import MatrixGroup
from engine.cuda.matrix.matvec import multiprocessor_count
from engine.cuda.matrix.matvec_plan import MAX_MATRICES, Job
from engine.gguf.types import GGMLType

ARCH = 80
"""The first compute capability with TF32."""

_FILES = ("formats.cuh", "float_parts.cuh", "float_gemm.cu")
_FEW_FILES = ("formats.cuh", "float_parts.cuh", "float_few.cu")
_SPLIT, _COLUMNS = 4, 64  # as in the kernel
_MOST_STAGES = 5
_FEW_THREADS, _FEW_BYTES = 512, 64 * 10 * 32 * 4


@dataclass(frozen=True)
class Shape:
    """What a block computes; speed alone depends on it.

    Attributes:
        tiles: of 16 outputs. rows: of x.
        warp_tiles, warp_rows: tiles of a warp, and eights of rows.
        blocks: of a multiprocessor.
        alone, crowded: microseconds of a block of 2048 columns where it has a multiprocessor for itself, and where all
            blocks of one have work; measured on an H200.
        few: the kernel of float_few.cu, which waits for memory once.
    """

    tiles: int
    rows: int
    warp_tiles: int
    warp_rows: int
    blocks: int
    alone: float
    crowded: float
    few: bool = False

    @property
    def kernel(self) -> str:
        """Its entry point."""
        return "float_few" if self.few else "float_gemm"

    @property
    def threads(self) -> int:
        """Of a block."""
        if self.few:
            return _FEW_THREADS
        return 32 * _SPLIT * (self.tiles // self.warp_tiles) * (self.rows // 8 // self.warp_rows)

    @property
    def stage_bytes(self) -> int:
        """Shared memory of 64 columns: weights, x, and the norm's weights."""
        return 64 * self.tiles * _COLUMNS + 4 * self.rows * (_COLUMNS + 16) + 4 * _COLUMNS

    def shared_bytes(self, arch: int) -> int:
        """Shared memory of a block."""
        return _FEW_BYTES if self.few else self.stages(arch) * self.stage_bytes

    def stages(self, arch: int) -> int:
        """Stages that shared memory has room for."""
        room = shared_limit(arch) // self.blocks - 1024
        return min(_MOST_STAGES, room // self.stage_bytes)

    def fits(self, arch: int) -> bool:
        """Whether a card has shared memory for it."""
        return self.few or self.stages(arch) >= 2

    def grid(self, tiles: int, rows: int) -> tuple[int, int]:
        """Blocks of outputs and of rows."""
        return -(-tiles // self.tiles), -(-rows // self.rows)


FEW = Shape(1, 16, 1, 2, 1, 9.5, 9.5, few=True)
SHAPES = (Shape(4, 32, 2, 4, 2, 35, 54), Shape(4, 16, 2, 2, 2, 23, 33), FEW)


def supports(types: Iterable[GGMLType], arch: int) -> bool:
    """Whether matrices of these types, side by side, are multiplied here."""
    return arch >= ARCH and all(type is GGMLType.F32 for type in types)


@cache
def choose_shape(tiles: int, rows: int, card: tuple[int, int]) -> Shape:
    """The shape that should be fastest, by whole rounds of blocks over the card and what is left.

    Args:
        tiles: of 16 outputs.
        rows: T.
        card: compute capability and number of multiprocessors.
    """
    arch, multiprocessors = card

    def cost(shape: Shape) -> float:
        across, down = shape.grid(tiles, rows)
        rounds, left = divmod(across * down, shape.blocks * multiprocessors)
        return rounds * shape.crowded + (0.0 if not left else shape.alone if left <= multiprocessors else shape.crowded)

    return min((shape for shape in SHAPES if shape.fits(arch)), key=cost)


def float_job(shape: Shape, arch: int) -> Job:
    """The (files, defines) pair of the kernel, for compiler.prebuild."""
    if shape.few:
        return _FEW_FILES, {}
    return _FILES, {
        "TILES": shape.tiles,
        "TOKENS": shape.rows,
        "WARP_TILES": shape.warp_tiles,
        "WARP_ROWS": shape.warp_rows,
        "STAGES": shape.stages(arch),
        "THREADS": shape.threads,
        "BLOCKS": shape.blocks,
    }


def build_jobs(arch: int) -> list[Job]:
    """All (files, defines) pairs that products of any number of rows need, for compiler.prebuild."""
    return [float_job(shape, arch) for shape in SHAPES if shape.fits(arch)]


def multiply(
    group: MatrixGroup,
    x: DeviceArray,
    out: DeviceArray,
    *,
    norm: DeviceArray | None = None,
    eps: float = 0.0,
    bias: DeviceArray | None = None,
    alpha: float = 1.0,
    add: bool = False,
    second: DeviceArray | None = None,
    shape: Shape | None = None,
    stream: Stream | None = None,
) -> None:
    """out = or += alpha * (norm(x) @ W.T + bias) for a group of float32 matrices.

    It waits for its predecessors before it lets its successor start.

    Args:
        group: the matrices, as supports() allows; their outputs follow each other.
        x: float32 (T, K), rows contiguous.
        out: float32 (T, >= group.width), rows contiguous; must not overlap x. With a paired matrix that of gate.
        norm: float32 (K,) weight of an RMSNorm applied to x first; None for none.
        eps: the norm's epsilon.
        bias: float32 (group.width,), added to the product; not with a paired matrix.
        alpha: factor of product + bias.
        add: add to out.
        second: as out, for the up projection of a paired matrix; None for others.
        shape: of the blocks; chosen when left out.
        stream: the current stream when left out.
    """
    rows, columns = (int(n) for n in x.shape)
    assert columns == group.columns and all(matrix.type is GGMLType.F32 for matrix in group.matrices)
    assert group.paired == (second is not None) and (bias is None or second is None)
    for target in (out, second):
        assert target is None or (target.shape[0] >= rows and target.shape[1] >= group.width and target.strides[1] == 4)
    assert x.strides[1] == 4
    segments: list[Argument] = []
    end = column = 0
    for matrix in group.matrices:
        end += matrix.tiles
        segments += [matrix.data, matrix.scale, end, matrix.rows, column]
        column += matrix.rows
    segments += [None, None, end, 0, 0] * (MAX_MATRICES - len(group.matrices))
    arch, multiprocessors = _card()
    chosen = shape or choose_shape(end, rows, (arch, multiprocessors))
    by_four = columns % 4 == x.strides[0] % 16 == x.data.ptr % 16 == 0 and (norm is None or norm.data.ptr % 16 == 0)
    args: tuple[Argument, ...] = (
        *segments,
        group.matrices[0].layout.chunks(columns),
        columns,
        x,
        x.strides[0] // 4,
        rows,
        norm,
        float(eps),
        int(by_four),
        bias,
        float(alpha),
        int(add),
        out,
        out.strides[0] // 4,
        second,
        0 if second is None else second.strides[0] // 4,
    )
    files, defines = float_job(chosen, arch)
    kernel = build(files, defines=defines).get(chosen.kernel)
    shared = chosen.shared_bytes(arch)
    launch(kernel, chosen.grid(end, rows), chosen.threads, args, shared=shared, stream=stream)


def _card() -> tuple[int, int]:
    import cupy

    return device_arch(), multiprocessor_count(cupy.cuda.Device().id)
