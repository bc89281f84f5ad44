"""A mixture of experts over the rows of a decode step on Hopper: rows that chose the same expert read it together.

Letters: B rows, E experts of a stack, U experts of a row, D width, F width of an expert; experts that every row uses
count as the others. A pair is a row and one of its experts; up to 8 pairs of one expert form a group, and up to three
groups a run, which reads the expert once (moe_rows.cu). A row's bits do not depend on the other rows. Inputs and hidden
vectors are float16, as in prompts. Must not know of models.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import Argument, DeviceArray
from engine.cuda.driver.compiler import build, device_arch, shared_limit
from engine.cuda.driver.launch import launch
from engine.cuda.experts.router import KernelRouting, route, route_job
from engine.cuda.formats.layouts import LAYOUTS
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.matrix import decode_gemm_plan
from engine.cuda.matrix.decode_gemm_plan import groups_of_eight
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.types import GGMLType

_FILES = (
    "formats.cuh",
    "formats_coded.cuh",
    "half_pairs.cuh",
    "gemm_unpack.cuh",
    "hopper.cuh",
    "activation.cuh",
    "formats_half.cuh",
    "moe_rows_columns.cuh",
    "moe_rows.cu",
)
_BEGIN_FILES = ("decode_gemm_convert.cuh", "moe_rows_begin.cu")
_ARCH = 90
GROUP = 8
"""Pairs of a group: the columns of one product of the tensor cores."""
RUN = 3
"""Groups of an expert that read it together."""
MAX_ROWS = 256
"""Rows of one turn; more take several."""
INPUT_BYTES = 5120
"""Of 256 columns of a group."""
WAITS = 4
"""Most groups whose inputs a block keeps; runs that it waits for at a time."""
SHARING_ROWS = 5
"""From so many sequences on, rows of decode steps share experts, unless bits must not depend on the number.

On an H200, 8 of 128 experts of 768 x 2048, Q4_K with half of down Q6_K, microseconds a layer, sharing and pair by pair:
1 row 22 and 13, 4 rows 42 and 44, 8 rows 59 and 80, 16 rows 78 and 150, 64 rows 108 and 570."""
_ALIGNED = 1024
_BEGIN_WARPS = 16
_END_COLUMNS = 1024
_END_THREADS = 128

Job = tuple[tuple[str, ...], dict[str, object]]


@dataclass(frozen=True)
class Tuning:
    """Shape of a block.

    Attributes:
        split: warps that share the columns of one tile; it decides the order of sums.
        depth: chunks that a warp keeps in flight.
        pages: groups whose inputs a block keeps in shared memory; 0: the caches hold them.
        warps: warps of a block.
    """

    split: int
    depth: int
    pages: int
    warps: int = 16

    def shared(self, type: GGMLType, columns: int) -> int:
        """Bytes of shared memory of a block."""
        sums = 512 if self.split > 1 else 0
        own = self.warps * (self.depth * (LAYOUTS[type].chunk_bytes + 8) + sums)
        return own + self.pages * _group_bytes(columns) + 16 * WAITS


def _group_bytes(columns: int) -> int:
    """Bytes of what a group multiplies."""
    return -(-columns // 256) * INPUT_BYTES


_RING = 112 << 10  # most bytes of weights in flight


def choose_tuning(type: GGMLType, columns: int) -> Tuning:
    """The block for matrices of a type with so many columns.

    On an H200, 8 of 128 experts of 768 x 2048 (8 and 3 chunks), 16 rows: 85 us a layer, 95 with two warps a tile.
    Experts with more columns are fewer, and so are the tiles of one row. Inputs in shared memory instead of the caches:
    121 to 114 us for 64 rows, 195 to 174 for 256.
    """
    chunks = LAYOUTS[type].chunks(columns)
    split = 1 if chunks <= 16 else 2 if chunks <= 32 else 4
    for depth in (3, 2):
        for pages in (WAITS, RUN):
            tuning = Tuning(split, depth, pages)
            ring = tuning.warps * depth * LAYOUTS[type].chunk_bytes
            if ring <= _RING and tuning.shared(type, columns) <= shared_limit(_ARCH):
                return tuning
    return Tuning(split, max(1, min(3, _RING // (16 * LAYOUTS[type].chunk_bytes))), 0)


def can_share(gate_up: GGMLType, down: GGMLType, width: int, columns: int, arch: int) -> bool:
    """Whether experts of these types and this size, which can be gathered (moe.py), are served on a card."""
    shapes = ((gate_up, columns), (down, width))
    return arch == _ARCH and all(t is not GGMLType.F32 and k % LAYOUTS[t].chunk_columns == 0 for t, k in shapes)


def defines_of(type: GGMLType, activation: KernelActivation, tuning: Tuning) -> dict[str, object]:
    """What the kernels of a product are built with."""
    return {
        "FORMAT0": type.name,
        "ACTIVATION": int(activation),
        "WARPS": tuning.warps,
        "SPLIT": tuning.split,
        "DEPTH": tuning.depth,
        "SLOT": LAYOUTS[type].chunk_bytes,
        "PAGES": tuning.pages,
    }


def _job(type: GGMLType, activation: KernelActivation, columns: int) -> Job:
    return _FILES, defines_of(type, activation, choose_tuning(type, columns))


def build_jobs(
    gate_up: GGMLType, down: GGMLType, activation: KernelActivation, routing: KernelRouting, width: int, columns: int
) -> list[Job]:
    """All build jobs of RowExperts, for compiler.prebuild."""
    products = [_job(gate_up, activation, columns), _job(down, activation, width)]
    return [*products, (_BEGIN_FILES, {}), route_job(routing)]


def _groups(rows: int, routing: KernelRouting) -> int:
    """Most groups that so many rows may form."""
    pairs = rows * routing.n_places
    return (pairs + (GROUP - 1) * min(pairs, routing.n_stacked)) // GROUP


def section_bytes(rows: int, routing: KernelRouting, width: int, columns: int) -> list[int]:
    """Bytes of: inputs and later results, hidden vectors, the table of groups, places, ids, weights."""
    groups, pairs = _groups(rows, routing), rows * routing.n_places
    results, hidden = GROUP * groups * 4 * columns, groups * _group_bytes(width)
    sizes = [max(results, groups * _group_bytes(columns)), hidden, 4 * (2 + 2 * groups), *[4 * pairs] * 3]
    return [-(-size // _ALIGNED) * _ALIGNED for size in sizes]


def room_bytes(rows: int, routing: KernelRouting, width: int, columns: int) -> int:
    """Scratch memory of a call for at most so many rows."""
    return sum(section_bytes(min(rows, MAX_ROWS), routing, width, columns))


class RowExperts:
    """out += sum_u weight_u * down_u(f(gate_u n(x)) * up_u n(x)) for the experts u that each row chooses.

    Args:
        gate_up: paired matrix (E * F, D), expert after expert.
        down: matrix (E * D, F).
        routing: how a row chooses.
        activation: f.
        router_bias: float32 (E,) added to the gates for choosing only, or None.
        gate_bias: float32 (E, F) or None. up_bias likewise. down_bias: float32 (E, D) or None.
        weigh_input: the weights multiply the experts' input instead of their output.
    """

    def __init__(
        self,
        gate_up: PackedMatrix,
        down: PackedMatrix,
        routing: KernelRouting,
        activation: KernelActivation,
        *,
        router_bias: DeviceArray | None = None,
        gate_bias: DeviceArray | None = None,
        up_bias: DeviceArray | None = None,
        down_bias: DeviceArray | None = None,
        weigh_input: bool = False,
    ) -> None:
        import cupy

        assert gate_up.paired and not down.paired
        self._blocks = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        self.routing = routing
        self.width, self.columns = gate_up.rows // routing.n_stacked, gate_up.columns
        assert can_share(gate_up.type, down.type, self.width, self.columns, device_arch())
        self._gate_up, self._down = gate_up, down
        self._activation = activation
        self._router_bias = router_bias
        self._gate_bias, self._up_bias, self._down_bias = gate_bias, up_bias, down_bias
        self._weigh_input = weigh_input

    def __call__(
        self,
        x: DeviceArray,
        scores: DeviceArray,
        room: DeviceArray,
        out: DeviceArray,
        *,
        norm: DeviceArray | None = None,
        eps: float = 0.0,
        positions: DeviceArray | None = None,
        emitted: tuple[DeviceArray | None, DeviceArray] | None = None,
    ) -> None:
        """Adds the experts that each row chooses.

        Args:
            x: float32 (B, D), rows contiguous, 16-byte aligned.
            scores: float32 (B, routing.n_scores), contiguous: raw outputs of the router.
            room: uint8, 1024-byte aligned, at least room_bytes(B, ...) long.
            out: float32 (B, D), as x, added to; may be x.
            norm: float32 (D,), weight of an RMSNorm applied to x; None for none.
            eps: its epsilon.
            positions: int32 (B,); rows with -1 are left alone. None: there are none.
            emitted: see DecodeGemm, which takes so many rows.
        """
        assert emitted is None or int(x.shape[0]) <= decode_gemm_plan.MAX_ROWS
        for first in range(0, int(x.shape[0]), MAX_ROWS):
            turn = slice(first, first + MAX_ROWS)
            active = None if positions is None else positions[turn]
            self._turn(x[turn], scores[turn], room, out[turn], norm, eps, active, emitted)

    def _turn(
        self,
        x: DeviceArray,
        scores: DeviceArray,
        room: DeviceArray,
        out: DeviceArray,
        norm: DeviceArray | None,
        eps: float,
        positions: DeviceArray | None,
        emitted: tuple[DeviceArray | None, DeviceArray] | None,
    ) -> None:
        import cupy

        rows, columns, routing = int(x.shape[0]), self.columns, self.routing
        assert x.shape == out.shape == (rows, columns) and scores.shape == (rows, routing.n_scores)
        assert all((a.data.ptr | a.strides[0]) % 16 == 0 for a in (x, out))
        sizes = section_bytes(rows, routing, self.width, columns)
        assert room.nbytes >= sum(sizes)
        parts, start = [], 0
        for size in sizes:
            parts.append(room[start : start + size])
            start += size
        operand, hidden, table, places, ids = (part.view(cupy.int32) for part in parts[:5])
        pairs, used = rows * routing.n_places, routing.n_places
        chosen = ids[:pairs].reshape(rows, used), parts[5].view(cupy.float32)[:pairs].reshape(rows, used)
        route(routing, scores, *chosen, bias=self._router_bias, positions=positions)
        kernels = build(_BEGIN_FILES, defines={})
        begin = (
            *chosen,
            used,
            routing.n_stacked,
            x,
            x.strides[0] // 4,
            norm,
            float(eps),
            columns,
            int(self._weigh_input),
            RUN,
            table,
            places,
            operand,
        )
        launch(kernels.get("moe_rows_begin"), rows, _BEGIN_WARPS * 32, begin)
        biases = (self._gate_bias, self._up_bias)
        self._multiply("moe_rows_gate_up", self._gate_up, table, operand, (*biases, hidden))
        self._multiply("moe_rows_down", self._down, table, hidden, (self._down_bias, operand))
        weights = None if self._weigh_input else chosen[1]
        after, left = emitted or (None, None)
        groups = 0 if left is None else groups_of_eight(rows)
        end = (operand, places, weights, used, columns, out, out.strides[0] // 4, after, groups, left)
        launch(kernels.get("moe_rows_end"), (-(-columns // _END_COLUMNS), rows), _END_THREADS, end)

    def _multiply(
        self, name: str, matrix: PackedMatrix, table: DeviceArray, operand: DeviceArray, more: tuple[Argument, ...]
    ) -> None:
        files, defines = _job(matrix.type, self._activation, matrix.columns)
        tuning = choose_tuning(matrix.type, matrix.columns)
        kernel = build(files, defines=defines).get(name)
        shared, experts = tuning.shared(matrix.type, matrix.columns), self.routing.n_stacked
        kernel.allow_shared(shared)
        kernel.leave_cache(shared)
        chunks = matrix.layout.chunks(matrix.columns)
        args = (
            matrix.data,
            matrix.scale,
            matrix.tiles // experts,
            chunks,
            matrix.rows // experts,
            table,
            operand,
            *more,
        )
        launch(kernel, self._blocks, tuning.warps * 32, args, shared=shared)
