"""Mixture of experts in decoding: the chosen experts' products straight from their packed weights.

Letters: B rows, E experts of a stack, U experts of a row, D width, F width of an expert; experts that every row uses
count as the others. Which experts are read is decided on the device, so a captured step reads only their bytes. Must
not know of models.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import Argument, DeviceArray, Stream
from engine.cuda.driver.compiler import build, device_arch, shared_limit
from engine.cuda.driver.launch import launch
from engine.cuda.experts.router import KernelRouting, route_job
from engine.cuda.formats.grid_tables import grid_bytes
from engine.cuda.formats.layouts import LAYOUTS, TILE_ROWS
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.matrix.matvec_plan import UNQUANTIZED, Job
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.types import GGMLType

_FILES = (
    "formats.cuh",
    "formats_coded.cuh",
    "hopper.cuh",
    "activation.cuh",
    "matvec_input.cuh",
    "matvec_tile.cuh",
    "route.cuh",
    "moe.cu",
)
_SPLIT = 2


def can_gather(gate: GGMLType, up: GGMLType, width: int, model_width: int) -> bool:
    """Whether experts of these types and widths fit the kernels: gate and up alike, and whole tiles per expert."""
    return gate is up and gate in LAYOUTS and width % (TILE_ROWS // 2) == 0 and model_width % TILE_ROWS == 0


@dataclass(frozen=True)
class _Blocks:
    """Warps of a block of either launch, and the bytes of their rings of weights.

    Where memory and registers of a multiprocessor hold a block of each, the second product's weights travel while the
    first one computes.
    """

    gate_up: int
    down: int
    ring: int


def _blocks(arch: int, type: GGMLType) -> _Blocks:
    """The blocks for a card and a type."""
    limit = shared_limit(arch)
    if limit >= 200 << 10:
        # On an H200, 8 of 128 experts of 768x2048, Q4_K, behind attention's output and the router, us for 1 and 4 rows:
        # 18.8 and 47.7; 12 warps for gate and up 19.0 and 53.1, 8 for down 19.0 and 49.5, 12 and 24 20.4 and 59.8.
        return _Blocks(6, 12, 112 << 10)
    ring = (limit - (52 << 10)) * 3 // 4  # the rest is for what rows bring, and rounding
    warps = next((warps for warps in (12, 8, 4) if warps * _slot(type) <= ring), 2)
    return _Blocks(warps, warps, ring)


def _depth(type: GGMLType, warps: int, arch: int, units: int = 8) -> int:
    """Chunks a warp keeps in flight; `units`: those it has in all."""
    return max(1, min(8, units, _blocks(arch, type).ring // (warps * _slot(type))))


def _slot(type: GGMLType) -> int:
    return -(-LAYOUTS[type].chunk_bytes // 16) * 16


def build_job(
    type: GGMLType, activation: KernelActivation, routing: KernelRouting, warps: int, arch: int, units: int = 8
) -> Job:
    """The (files, defines) pair of the kernels for experts of a type, for compiler.prebuild; units: see _depth."""
    return _FILES, {
        "FORMAT0": type.name,
        "NB": 1,
        "GROUPS_OF_NB": 1,
        "RESIDENT": 1,
        "ONE_SLAB": 1,
        "WARPS": warps,
        "SPLIT": _SPLIT,
        "DEPTH": _depth(type, warps, arch, units),
        "SLOT": _slot(type),
        "ACTIVATION": int(activation),
        **({"SHARED_GRIDS": 1} if grid_bytes([type]) else {}),
        **routing.defines,
    }


def build_jobs(
    gate_up: GGMLType,
    down: GGMLType,
    activation: KernelActivation,
    routing: KernelRouting,
    arch: int,
    width: int,
    columns: int,
) -> list[Job]:
    """All build jobs of ExpertProducts for experts of that width in a model of that width, and of route()."""
    return [
        _gate_up_job(gate_up, activation, routing, arch, columns),
        _down_job(down, activation, routing, arch, width),
        route_job(routing),
    ]


def _gate_up_job(type: GGMLType, activation: KernelActivation, routing: KernelRouting, arch: int, columns: int) -> Job:
    units = _gate_up_units(LAYOUTS[type].chunks(columns))
    return build_job(type, activation, routing, _blocks(arch, type).gate_up, arch, units)


def _down_job(type: GGMLType, activation: KernelActivation, routing: KernelRouting, arch: int, width: int) -> Job:
    warps = _blocks(arch, type).down
    units = _down_units(routing.n_places, LAYOUTS[type].chunks(width), warps)
    return build_job(type, activation, routing, warps, arch, units)


def _gate_up_units(chunks: int) -> int:
    return -(-chunks // _SPLIT)


def _down_units(used: int, chunks: int, warps: int) -> int:
    return -(-used * chunks // warps)


class ExpertProducts:
    """The gated feed-forward parts of a layer's experts: out (+)= sum_u w_u * down_u(f(gate_u n(x)) * up_u n(x)).

    A (row, expert) pair is computed by itself, so a row's bits do not depend on the other rows.

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
        assert gate_up.paired and not down.paired
        self.routing = routing
        stacked = routing.n_stacked
        self.width, self.columns = gate_up.rows // stacked, gate_up.columns
        assert gate_up.rows == self.width * stacked and down.rows == self.columns * stacked
        assert down.columns == self.width
        assert self.width % (TILE_ROWS // 2) == 0 and self.columns % TILE_ROWS == 0, "whole tiles per expert"
        self._gate_up, self._down = gate_up, down
        self._activation = activation
        self._router_bias = router_bias
        self._gate_bias, self._up_bias, self._down_bias = gate_bias, up_bias, down_bias
        self._weigh_input = weigh_input

    def gate_up(
        self,
        x: DeviceArray,
        scores: DeviceArray,
        h: DeviceArray,
        *,
        norm: DeviceArray | None = None,
        eps: float = 0.0,
        positions: DeviceArray | None = None,
        early: bool = True,
        stream: Stream | None = None,
    ) -> None:
        """KernelRouting and the experts' first products: h = f(gate n(x)) * up n(x) for every (row, expert) pair.

        Started early: x is read before the wait, so a launch that waits first must come between the one that writes x
        and this one. The router's product does, unless the scores were computed before x: then `early` is False.

        Args:
            x: float32 (B, D), rows contiguous.
            scores: float32 (B, routing.n_scores), contiguous: raw outputs of the router.
            h: float32 (B * U, F), contiguous, written.
            norm: float32 (D,), weight of an RMSNorm applied to x; None for none.
            eps: its epsilon.
            positions: int32 (B,); rows with -1 are inactive and left alone. None: all are active.
            early: the kernel may start before the launch before it has ended.
            stream: the current stream when left out.
        """
        rows, used = int(x.shape[0]), self.routing.n_places
        assert scores.shape == (rows, self.routing.n_scores)
        assert h.shape == (rows * used, self.width)
        assert x.shape[1] == self.columns
        matrix, arch = self._gate_up, device_arch()
        warps = _blocks(arch, matrix.type).gate_up
        tiles = matrix.tiles // self.routing.n_stacked
        shared = gate_up_bytes(matrix.type, matrix.layout.chunks(self.columns), arch)
        files, defines = _gate_up_job(matrix.type, self._activation, self.routing, arch, self.columns)
        kernel = build(files, defines=defines).get("moe_gate_up")
        kernel.allow_shared(shared)
        args = (
            matrix.data,
            matrix.scale,
            tiles,
            self.width,
            self.columns,
            scores,
            self._router_bias,
            float(self.routing.weight_scale),
            float(self.routing.shared_scale),
            positions,
            int(self._weigh_input),
            x,
            x.strides[0] // 4,
            norm,
            float(eps),
            self._gate_bias,
            self._up_bias,
            h,
            1.0 / self.columns,
        )
        grid = (-(-tiles // (warps // _SPLIT)), rows * used)
        launch(kernel, grid, warps * 32, args, shared=shared, stream=stream, pdl=early)

    def down(
        self,
        scores: DeviceArray,
        h: DeviceArray,
        out: DeviceArray,
        *,
        add: bool = True,
        positions: DeviceArray | None = None,
        stream: Stream | None = None,
    ) -> None:
        """The experts' second product and their weighted sum: out (B, D) float32 (+)= sum_u w_u * down_u(h).

        scores, h and positions are gate_up's; inactive rows of out are left alone. Started early: scores and out are
        read before the wait; gate_up comes between them and what wrote them.
        """
        assert out.shape == (scores.shape[0], self.columns)
        arch, routing = device_arch(), self.routing
        scales = float(routing.weight_scale), float(routing.shared_scale)
        launch_down(
            self._down,
            routing,
            _down_job(self._down.type, self._activation, routing, arch, self.width),
            _blocks(arch, self._down.type).down,
            (None, scores, self._router_bias, *scales, positions, int(not self._weigh_input)),
            h,
            self._down_bias,
            out,
            add=add,
            stream=stream,
        )


def _quad_bytes(type: GGMLType) -> int:
    """Shared memory of 128 inputs: two bytes each, a scale per 32, a sum per 16; or pairs of halves with a scale."""
    return 528 if type in UNQUANTIZED else 304


def _ring_bytes(type: GGMLType, warps: int, depth: int) -> int:
    """Shared memory of the rings, their barriers and the partial sums."""
    return warps * (depth * (_slot(type) + 8) + 64) + 8


def gate_up_bytes(type: GGMLType, chunks: int, arch: int) -> int:
    """Shared memory of a block of moe_gate_up for rows of so many chunks."""
    warps = _blocks(arch, type).gate_up
    inputs = chunks * (LAYOUTS[type].chunk_columns // 128) * _quad_bytes(type)
    depth = _depth(type, warps, arch, _gate_up_units(chunks))
    return _ring_bytes(type, warps, depth) + 16 * -(-warps // 4) + inputs


def down_bytes(type: GGMLType, used: int, chunks: int, warps: int, depth: int) -> int:
    """Shared memory of a block of moe_down for a row's `used` experts of so many chunks each."""
    units = _down_units(used, chunks, warps)
    inputs = warps * units * (LAYOUTS[type].chunk_columns // 128) * _quad_bytes(type)
    return _ring_bytes(type, warps, depth) + inputs


def launch_down(
    matrix: PackedMatrix,
    routing: KernelRouting,
    job: Job,
    warps: int,
    chosen: tuple[Argument, ...],
    h: DeviceArray,
    bias: DeviceArray | None,
    out: DeviceArray,
    *,
    add: bool,
    stream: Stream | None = None,
) -> None:
    """Launches moe_down: out[row] (+)= sum over its experts e of weight * (W_e h[row, e] + bias_e).

    chosen: the kernel's arguments ids .. weigh, which say what the experts are.
    """
    files, defines = job
    rows, tiles = int(out.shape[0]), matrix.tiles // routing.n_stacked
    chunks, depth = matrix.layout.chunks(matrix.columns), int(str(defines["DEPTH"]))
    shared = down_bytes(matrix.type, routing.n_places, chunks, warps, depth)
    kernel = build(files, defines=defines).get("moe_down")
    kernel.allow_shared(shared)
    args = (
        matrix.data,
        matrix.scale,
        tiles,
        matrix.rows // routing.n_stacked,
        matrix.columns,
        *chosen,
        h,
        bias,
        out,
        out.strides[0] // 4,
        int(add),
    )
    launch(kernel, (tiles, rows), warps * 32, args, shared=shared, stream=stream)
