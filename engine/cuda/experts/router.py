"""Which experts a row uses: how they are chosen, and the scores they are chosen by, in a launch shaped for latency.

Letters: B or T rows, E experts, U experts a row chooses, S shared experts, D width. The launch serves unquantized
routers; others are products like any other. Must not know of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.compiler import build, device_arch
from engine.cuda.driver.launch import launch
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.matrix.matvec import multiprocessor_count
from engine.cuda.matrix.matvec_plan import UNQUANTIZED, Job
from engine.gguf.types import GGMLType

_FILES = ("formats.cuh", "formats_coded.cuh", "float_parts.cuh", "router.cu")
_ROUTE_FILES = ("route.cuh", "route.cu")
MAX_EXPERTS = 1024
MAX_USED = 32
_FOURS = 2  # of columns, that a thread of the kernel keeps in registers
_BLOCKS = 1024  # of a launch for many rows: about what a card holds at once; a block then has several rows
_TOGETHER = 8  # rows that router_rows multiplies together
_SEGMENT, _SEGMENT_FLOATS = 128, 8 * 17  # columns that its warps take at a time, and the sums of them
_SEGMENTS = 64
_TF32_ARCH = 80


class Gating(IntEnum):
    """What router scores become before experts are chosen."""

    SOFTMAX = 0
    SIGMOID = 1
    SOFTMAX_OF_CHOSEN = 2
    SQRT_SOFTPLUS = 3


@dataclass(frozen=True)
class KernelRouting:
    """How a row's experts are chosen and weighted; see route.cuh.

    Attributes:
        n_experts: E. n_used: U.
        gating: function of the scores.
        groups: equal groups of consecutive experts, 1 = none. groups_used: groups to choose from.
        normalize: divide the weights by their sum.
        weight_scale: factor of the weights.
        n_shared: S, experts behind the E that every row uses as well, behind those it chooses.
        shared_scored: a row has one more score, behind those of the E, whose sigmoid is the weight of the S.
        shared_scale: factor of that weight, or all of it.
    """

    n_experts: int
    n_used: int
    gating: Gating = Gating.SOFTMAX
    groups: int = 1
    groups_used: int = 1
    normalize: bool = True
    weight_scale: float = 1.0
    n_shared: int = 0
    shared_scored: bool = False
    shared_scale: float = 1.0

    def __post_init__(self) -> None:
        assert 1 <= self.n_used <= self.n_experts and self.n_places <= MAX_USED and self.n_stacked <= MAX_EXPERTS
        assert 1 <= self.groups_used <= self.groups
        assert self.n_experts % self.groups == 0

    @property
    def n_places(self) -> int:
        """Experts of a row, U + S."""
        return self.n_used + self.n_shared

    @property
    def n_stacked(self) -> int:
        """Experts below each other in a matrix, E + S."""
        return self.n_experts + self.n_shared

    @property
    def n_scores(self) -> int:
        """Scores of a row: E, or one more."""
        return self.n_experts + self.shared_scored

    @property
    def defines(self) -> dict[str, object]:
        """Preprocessor names of route.cuh."""
        return {
            "EXPERTS": self.n_experts,
            "USED": self.n_used,
            "GATING": int(self.gating),
            "ROUTE_GROUPS": self.groups,
            "GROUPS_USED": self.groups_used,
            "NORMALIZE": int(self.normalize),
            "SHARED": self.n_shared,
            "SHARED_SCORED": int(self.shared_scored),
        }


def route(
    routing: KernelRouting,
    scores: DeviceArray,
    ids: DeviceArray,
    weights: DeviceArray,
    *,
    bias: DeviceArray | None = None,
    positions: DeviceArray | None = None,
    stream: Stream | None = None,
) -> None:
    """Chooses experts for T rows.

    Args:
        routing: how.
        scores: float32 (T, n_scores), contiguous.
        ids: int32 (T, n_places), written: the experts, best first, and those of every row; -1 for inactive rows.
        weights: float32 (T, n_places), written.
        bias: float32 (E,) added to the gates for choosing only.
        positions: int32 (T,); rows with -1 are inactive. None: all are active.
        stream: the current stream when left out.
    """
    assert scores.shape[1] == routing.n_scores
    assert ids.shape[1] == weights.shape[1] == routing.n_places
    files, defines = route_job(routing)
    launch(
        build(files, defines=defines).get("route_top"),
        int(scores.shape[0]),
        32,
        (scores, bias, float(routing.weight_scale), float(routing.shared_scale), positions, ids, weights),
        stream=stream,
    )


def route_job(routing: KernelRouting) -> Job:
    """The (files, defines) pair of the routing kernel."""
    return _ROUTE_FILES, routing.defines


def _multiprocessors() -> int:
    import cupy

    return multiprocessor_count(int(cupy.cuda.runtime.getDevice()))


def can_score(type: GGMLType, columns: int) -> bool:
    """Whether a router of this type and width has the kernel."""
    return type in UNQUANTIZED and columns % 4 == 0


def can_score_together(type: GGMLType, columns: int, arch: int) -> bool:
    """Whether score_experts() multiplies 8 rows together: float32 routers, and TF32 on the card."""
    return type is GGMLType.F32 and can_score(type, columns) and columns <= _SEGMENT * _SEGMENTS and arch >= _TF32_ARCH


def router_job(type: GGMLType, arch: int) -> Job:
    """The (files, defines) pair of the kernels, for compiler.prebuild."""
    return _FILES, {"FORMAT": type.name, "ROWS_TOGETHER": int(can_score_together(type, 4, arch))}


def score_experts(
    matrix: PackedMatrix,
    x: DeviceArray,
    scores: DeviceArray,
    *,
    bias: DeviceArray | None = None,
    alpha: float = 1.0,
    norm: DeviceArray | None = None,
    eps: float = 0.0,
    together: bool = False,
    stream: Stream | None = None,
) -> None:
    """scores = alpha * (W norm(x) + bias).

    A row's bits do not depend on the other rows, but on `together`. It waits for its predecessors before it lets its
    successor start.

    Args:
        matrix: W (E, D), what can_score() allows.
        x: float32 (B, D), rows aligned to 16 bytes.
        scores: float32 (B, E), contiguous, written.
        bias: float32 (E,), or None.
        alpha: factor of the result.
        norm: float32 (D,), weight of an RMSNorm applied to x, aligned to 16 bytes; None for none.
        eps: its epsilon.
        together: rows are multiplied 8 at a time, on tensor cores; needs can_score_together().
        stream: the current stream when left out.
    """
    assert can_score(matrix.type, matrix.columns) and not matrix.paired
    assert x.data.ptr % 16 == 0 and x.strides[0] % 16 == 0 and (norm is None or norm.data.ptr % 16 == 0)
    assert x.shape == (scores.shape[0], matrix.columns)
    assert scores.shape[1] == matrix.rows
    assert scores.flags.c_contiguous
    arch = device_arch()
    files, defines = router_job(matrix.type, arch)
    fours = matrix.columns // 4
    threads = min(1024, max(32, -(-fours // (_FOURS * 32)) * 32))
    args = (
        matrix.data,
        matrix.scale,
        matrix.rows,
        matrix.layout.chunks(matrix.columns),
        matrix.columns,
        x,
        x.strides[0] // 4,
        int(x.shape[0]),
        norm,
        float(eps),
        bias,
        float(alpha),
        scores,
        1.0 / matrix.columns,
    )
    if together:
        assert can_score_together(matrix.type, matrix.columns, arch)
        segments = -(-matrix.columns // _SEGMENT)
        shared = 4 * (segments * _SEGMENT_FLOATS + matrix.columns)
        grid = matrix.tiles, -(-int(x.shape[0]) // _TOGETHER)
        # Half as many warps where blocks of 16, which fill a multiprocessor, would need another round.
        warps = min(16, segments) if grid[0] * grid[1] <= _multiprocessors() else min(8, segments)
        kernel = build(files, defines=defines).get("router_rows")
        launch(kernel, grid, 32 * warps, args, shared=shared, stream=stream)
        return
    blocks = matrix.tiles * 8
    grid = blocks, min(int(x.shape[0]), max(8, _BLOCKS // blocks))
    launch(build(files, defines=defines).get("router"), grid, threads, args, stream=stream)
