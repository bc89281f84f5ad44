"""A mixture of experts over many rows on Hopper: rows are grouped by expert, each expert multiplies only its own.

Letters: T rows, E experts of a stack, U experts of a row, D width, F width of an expert, P places; experts that every
row uses count as the others. A row's bits do not depend on the other rows: those of the products do not (gemm.py), and
sums follow the row's own order. Must not know of models.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.experts.router import MAX_EXPERTS, KernelRouting, route
from engine.cuda.matrix.gemm import Gemm, Operand, TokenTiles, make_operand
from engine.cuda.matrix.gemm_plan import EXPERT_TILES, Job, Tile, operand_bytes
from engine.cuda.matrix.linear import MatrixGroup

GROUPED_ROWS = 257
"""From so many sequences on, decode steps group their rows as prompts do, unless bits must not depend on the number:
more than one turn of moe_rows.py. Microseconds of the layer below for 256 rows: shared 173, grouped 186."""
EXPERT_ROWS = (11, 29, 62)
"""Mean rows of an expert up to which each tile shape but the last is the fastest.

On an H200, 8 of 128 experts of 768 x 2048, Q4_K with half of down Q6_K, microseconds a layer by tokens of a tile:
128 rows (8 of an expert) 166, 183 with 16, 32; 192: 186, 185; 384: 201, 249 with 32, 64; 512: 266, 254; 768: 266, 355
with 64, 128; 1024: 370, 372; 2048: 590, 555."""

_FILES = ("experts.cu",)
_ALIGNED = 1024


@dataclass(frozen=True, eq=False)
class StackedExperts:
    """The experts of a layer, one below the other.

    Attributes:
        gate_up: one paired matrix (E * F, D). down: one matrix (E * D, F).
        routing: how a row chooses.
        bias: float32 (E,) added to the gates for choosing only, or None.
        weigh_input: the weights multiply the experts' input instead of their output.
    """

    gate_up: MatrixGroup
    down: MatrixGroup
    routing: KernelRouting
    bias: DeviceArray | None = None
    weigh_input: bool = False

    @property
    def width(self) -> int:
        """F."""
        return self.gate_up.width // self.routing.n_stacked

    @property
    def columns(self) -> int:
        """D."""
        return self.gate_up.columns


def can_stack(width: int, columns: int, n_experts: int) -> bool:
    """Whether the kernels take experts of this size: whole runs of 64 outputs, whole blocks of columns."""
    return width % 128 == 0 and columns % 128 == 0 and n_experts <= MAX_EXPERTS


def expert_tile(rows: int, routing: KernelRouting) -> Tile:
    """The tile shape for so many rows: most experts that are chosen get one tile of it."""
    return EXPERT_TILES[bisect_left(EXPERT_ROWS, rows * routing.n_used / routing.n_experts)]


def _places(rows: int, routing: KernelRouting) -> int:
    """P: places for pairs where every expert begins with a tile of its own."""
    pairs, tile = rows * routing.n_places, expert_tile(rows, routing).tokens
    used = min(pairs, routing.n_stacked)
    return (pairs + used * (tile - 1)) // tile * tile


def _sections(rows: int, routing: KernelRouting, width: int, columns: int) -> list[int]:
    """Bytes of: inputs and later results, hidden vectors, the table of tiles, places, ids, weights."""
    places, pairs = _places(rows, routing), rows * routing.n_places
    sizes = [
        max(operand_bytes(places, columns), 4 * places * columns),
        operand_bytes(places, width),
        4 * (1 + places // EXPERT_TILES[0].tokens),
        4 * pairs,
        4 * pairs,
        4 * pairs,
    ]
    return [-(-size // _ALIGNED) * _ALIGNED for size in sizes]


def room_bytes(rows: int, routing: KernelRouting, width: int, columns: int) -> int:
    """Scratch memory of run() for at most so many rows."""
    return max(sum(_sections(n, routing, width, columns)) for n in _turns(rows, routing))


def _turns(rows: int, routing: KernelRouting) -> set[int]:
    """The numbers of rows up to `rows` that may need most: the last of each tile shape."""
    limits = (most * routing.n_experts // routing.n_used for most in EXPERT_ROWS)
    return {rows, *(limit for limit in limits if 1 <= limit < rows)}


def build_jobs() -> list[Job]:
    """The (files, defines) pairs needed beside gemm.expert_jobs, for compiler.prebuild."""
    return [(_FILES, {})]


def run(
    experts: StackedExperts,
    gemm: Gemm,
    x: DeviceArray,
    scores: DeviceArray,
    room: DeviceArray,
    *,
    out: DeviceArray | None = None,
    norm: DeviceArray | None = None,
    eps: float = 0.0,
    positions: DeviceArray | None = None,
) -> None:
    """out += sum_u weight_u * down_u(f(gate_u n(x)) * up_u n(x)) for the experts u that each row chooses.

    Args:
        experts: the weights.
        gemm: the products, with f.
        x: float32 (T, D), rows contiguous.
        scores: float32 (T, routing.n_scores), contiguous: raw outputs of the router.
        room: uint8, 1024-byte aligned, at least room_bytes(T, ...) long.
        out: float32 (T, D), rows contiguous, added to; x when left out.
        norm: float32 (D,), weight of an RMSNorm applied to x; None for none.
        eps: its epsilon.
        positions: int32 (T,); rows with -1 are left alone. None: there are none.
    """
    import cupy

    out = x if out is None else out

    routing, width, columns = experts.routing, experts.width, experts.columns
    rows, used = int(x.shape[0]), routing.n_places
    sizes = _sections(rows, routing, width, columns)
    assert x.shape[1] == columns and room.nbytes >= sum(sizes)
    parts, start = [], 0
    for size in sizes:
        parts.append(room[start : start + size])
        start += size
    first, second = parts[:2]
    table, places, ids = (part.view(cupy.int32) for part in parts[2:5])
    ids, weights = (part[: rows * used].reshape(rows, used) for part in (ids, parts[5].view(cupy.float32)))

    route(routing, scores, ids, weights, bias=experts.bias, positions=positions)
    tile, most = expert_tile(rows, routing), _places(rows, routing)
    kernels = build(_FILES, defines={})
    launch(kernels.get("group_rows"), routing.n_stacked, 256, (ids, rows * used, tile.tokens, table, places))
    tiles = TokenTiles(tile, most // tile.tokens, table, routing.n_stacked)
    on_inputs, on_results = (weights, None) if experts.weigh_input else (None, weights)
    operand = make_operand(x, first, norm=norm, eps=eps, places=places, copies=used, weights=on_inputs, room_rows=most)
    hidden = Operand(second, most, width)
    gemm.experts(experts.gate_up, operand, second, tiles)
    results = first.view(cupy.float32)[: most * columns].reshape(most, columns)
    gemm.experts(experts.down, hidden, results, tiles)
    launch(
        kernels.get("add_experts"),
        rows,
        256,
        (results, places, on_results, used, columns, out, out.strides[0] // 4),
    )
