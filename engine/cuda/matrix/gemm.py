"""Products of many rows on Hopper: packed weights unpacked in registers, multiplied by wgmma. Launches gemm.cu.

Letters: T rows (tokens), K columns (inputs), N outputs. A result's bits do not depend on T, on the other rows, on the
row's place, or on which tile shape was chosen. Must not know of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np

from engine.cuda.driver.compiler import Kernel, build, device_arch, shared_limit
from engine.cuda.driver.launch import launch
from engine.cuda.formats.layouts import LAYOUTS
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.matrix.matvec import Activation, MatVec
from engine.gguf.types import GGMLType

Job = tuple[tuple[str, ...], dict[str, object]]
"""Kernel files and defines, for module.prebuild."""

ARCH = 90
"""The compute capability the kernel is written for; no other has its instructions."""

MAX_FORMATS = 2
"""Formats of one kernel: with three, ptxas no longer keeps multiplications in flight in the larger tiles."""

_FILES = ("formats.cuh", "formats_coded.cuh", "gemm_unpack.cuh", "hopper.cuh", "activation.cuh", "gemm.cu")
_OPERAND_FILES = ("operand.cu",)
_STORE, _ADD, _GATED, _GATED_OPERAND = range(4)  # enum Mode of gemm.cu
_SEGMENT = np.dtype(
    [
        ("data", "u8"),
        ("scale", "u8"),
        ("tiles", "i4"),
        ("rows", "i4"),
        ("column", "i4"),
        ("format", "i4"),
        ("chunk_bytes", "i8"),
    ]
)


@dataclass(frozen=True)
class Tile:
    """Shape of what a block computes at once.

    Attributes:
        groups: warpgroups that multiply, 64 outputs each.
        tokens: rows of x.
        cluster: blocks that share their rows of x.
        blocks: blocks of a multiprocessor.
        column: nanoseconds per column of a matrix, measured on an H200 with Q4_K and Q6_K.
        crowded: the same where all blocks of a multiprocessor have work.
        extra: nanoseconds of a tile beside its columns.
        parts: blocks that share the columns of a tile, as a cluster.
    """

    groups: int
    tokens: int
    cluster: int
    blocks: int
    column: float
    crowded: float
    extra: float
    parts: int = 1


TILES = (
    Tile(1, 16, 1, 2, 3.2, 4.5, 1500),
    Tile(1, 64, 1, 2, 4.8, 5.8, 2000),
    Tile(2, 64, 2, 1, 5.2, 5.2, 2000),
    Tile(2, 128, 2, 1, 6.0, 6.0, 3000),
    Tile(3, 128, 2, 1, 8.8, 8.8, 4000),
    Tile(2, 256, 2, 1, 10.0, 10.0, 6500),
)
"""Shapes for prompts. All give the same bits: each output is one chain of sums over all columns."""

STEP_TILES = (
    Tile(2, 64, 1, 1, 4.7, 4.7, 5500, parts=2),
    Tile(2, 96, 1, 1, 5.3, 5.3, 3000),
    Tile(2, 96, 1, 1, 5.3, 5.3, 6500, parts=2),
    Tile(2, 96, 1, 1, 5.3, 5.3, 9500, parts=3),
    Tile(3, 96, 1, 1, 8.0, 8.0, 4500),
    Tile(3, 96, 1, 1, 8.0, 8.0, 7500, parts=2),
    Tile(2, 128, 1, 1, 6.0, 6.0, 6000, parts=2),
    Tile(2, 128, 1, 1, 6.0, 6.0, 8500, parts=3),
    Tile(2, 192, 1, 1, 8.1, 8.1, 4500),
)
"""Further shapes, for decode steps of more than 64 rows.

A matrix of few outputs has fewer tiles than the card has multiprocessors; blocks that share the columns of a tile use
the others. On an H200 a decode step of 8B Q4_K_M with these shapes as well: 128 rows 7.65 to 6.21 ms, 256 rows 11.2 to
10.2 ms.
"""

_CLUSTERS = {1: 1.0, 2: 1.0, 3: 0.9}
"""Share of the multiprocessors that clusters of so many blocks can cover."""

EXPERT_TILES = (TILES[0], TILES[2], TILES[3])
"""Shapes for products of experts, in ascending tokens."""


def supports(type: GGMLType) -> bool:
    """Whether matrices of a type are multiplied here: all but float32, which would lose too much."""
    return type in LAYOUTS and type is not GGMLType.F32


def family(types: Sequence[GGMLType]) -> tuple[tuple[GGMLType, ...], ...]:
    """The types of a model as sets that share kernels: those with chunks of the same width, a few together."""
    families: list[tuple[GGMLType, ...]] = []
    for width in (128, 256):
        members = sorted({t for t in types if supports(t) and LAYOUTS[t].chunk_columns == width}, key=lambda t: t.value)
        families += [tuple(members[i : i + MAX_FORMATS]) for i in range(0, len(members), MAX_FORMATS)]
    return tuple(families)


@dataclass(frozen=True)
class _Memory:
    """Shared memory of a block: bytes, and stages of its two rings."""

    weight_stages: int
    x_stages: int
    n_bytes: int


def _memory(types: Sequence[GGMLType], tile: Tile) -> _Memory:
    columns = LAYOUTS[types[0]].chunk_columns
    weights = tile.groups * 4 * _slot(types)
    x, staged = tile.tokens * 128, tile.groups * tile.tokens * 64
    sums = tile.groups * tile.tokens * 256 if tile.parts > 1 else 0
    room = (shared_limit(ARCH) - 1024) // tile.blocks - 1024 - staged - 512 - (sums + 256 if sums else 0)
    for weight_stages in range(1024 // columns, 1, -1):
        x_stages = min(8, (room - weight_stages * weights) // x)
        if x_stages >= 4 or (weight_stages == 2 and x_stages >= 2):
            n_bytes = 1024 + weight_stages * weights + x_stages * x + staged + 16 * (weight_stages + x_stages)
            n_bytes += sums + 256 if sums else 0
            return _Memory(weight_stages, x_stages, n_bytes)
    raise AssertionError(f"no room for {types} in tiles {tile}")


def shared_bytes(types: Sequence[GGMLType], tile: Tile) -> int:
    """Shared memory of a block."""
    return _memory(types, tile).n_bytes


def _slot(types: Sequence[GGMLType]) -> int:
    return max(LAYOUTS[type].chunk_bytes for type in types)


def build_job(types: Sequence[GGMLType], tile: Tile, activation: Activation, *, experts: bool = False) -> Job:
    """The (files, defines) pair of the kernel of one tile shape for a family of types, for module.prebuild."""
    memory = _memory(types, tile)
    defines: dict[str, object] = {
        "EXPERTS": int(experts),
        "ACTIVATION": int(activation),
        "WGS": tile.groups,
        "TOKENS": tile.tokens,
        "CLUSTER": tile.cluster,
        "PARTS": tile.parts,
        "BLOCKS": tile.blocks,
        "REGISTERS": {1: 128, 2: 232, 3: 160}[tile.groups],
        "CHUNK": LAYOUTS[types[0]].chunk_columns,
        "W_STAGES": memory.weight_stages,
        "X_STAGES": memory.x_stages,
        "SLOT": _slot(types),
        "FORMATS": len(types),
    }
    defines |= {f"FORMAT{i}": type.name for i, type in enumerate(types)}
    return _FILES, defines


def build_jobs(types: Sequence[GGMLType], activation: Activation) -> list[Job]:
    """All (files, defines) pairs that products of a model with these types need, for module.prebuild."""
    return [(_OPERAND_FILES, {})] + [
        build_job(members, tile, activation) for members in family(types) for tile in TILES
    ]


def expert_jobs(types: Sequence[GGMLType], needed: Sequence[GGMLType], activation: Activation) -> list[Job]:
    """What products of experts need beside build_jobs().

    Args:
        types: of all matrices of the model.
        needed: of its experts.
        activation: between their gate and up.
    """
    families = [members for members in family(types) if set(members) & set(needed)]
    return [build_job(members, tile, activation, experts=True) for members in families for tile in EXPERT_TILES]


@cache
def choose_tile(units: int, tokens: int, columns: int, multiprocessors: int, step: bool = False) -> Tile:
    """The tile shape that should be fastest.

    Args:
        units: runs of 64 outputs.
        tokens: rows of x.
        columns: K.
        multiprocessors: of the card.
        step: rows of a decode step.
    """
    parts = [tile for tile in STEP_TILES if columns >= 512 * tile.parts] if step else []
    return min((*TILES, *parts), key=lambda tile: _nanoseconds(tile, units, tokens, columns, multiprocessors))


def _nanoseconds(tile: Tile, units: int, tokens: int, columns: int, multiprocessors: int) -> float:
    """Estimated time: whole rounds of tiles over the card, and what is left."""
    at_once = int(multiprocessors * tile.blocks * _CLUSTERS[tile.parts]) // (tile.cluster * tile.parts)
    columns = columns // tile.parts
    rounds, left = divmod(_clusters(tile, units, tokens), at_once)
    last = 0.0 if not left else tile.column if left * tile.cluster <= multiprocessors else tile.crowded
    return columns * (rounds * tile.crowded + last) + (rounds + bool(left)) * tile.extra


def _clusters(tile: Tile, units: int, tokens: int) -> int:
    return -(-tokens // tile.tokens) * -(-units // (tile.groups * tile.cluster))


@dataclass(frozen=True, eq=False)
class Operand:
    """Rows of x as float16 in the order of operand.cu.

    Attributes:
        data: uint8, on the device, at least operand_bytes(rows, columns).
        rows: T.
        columns: K.
    """

    data: Any
    rows: int
    columns: int

    @property
    def pitch(self) -> int:
        """Rows that each block of 64 columns has room for."""
        return -(-self.rows // 8) * 8


def operand_bytes(rows: int, columns: int) -> int:
    """Bytes of an Operand."""
    return -(-rows // 8) * 8 * -(-columns // 128) * 256


@dataclass(frozen=True, eq=False)
class TokenTiles:
    """Rows grouped by expert, for Gemm.experts.

    Attributes:
        tile: the shape.
        most: tiles there may be.
        table: int32, on the device: how many there are, then the expert of each.
        n_experts: matrices below one another.
    """

    tile: Tile
    most: int
    table: Any
    n_experts: int


def make_operand(
    x: Any,
    buffer: Any,
    *,
    norm: Any = None,
    eps: float = 0.0,
    places: Any = None,
    copies: int = 1,
    room_rows: int | None = None,
) -> Operand:
    """x or RMSNorm(x) * norm as an operand.

    Args:
        x: float32 (T, K), rows contiguous.
        buffer: uint8, contiguous, 1024-byte aligned, at least operand_bytes(T, K) long; the operand lies in it.
        norm: float32 (K,) or None.
        eps: the norm's epsilon.
        places: int32 (T, copies), the rows of the operand that each row goes to, -1 for none; None: its own.
        copies: of each row.
        room_rows: rows of the operand; T when left out.
    """
    rows, columns = (int(n) for n in x.shape)
    operand = Operand(buffer, rows if room_rows is None else room_rows, columns)
    assert buffer.nbytes >= operand_bytes(operand.rows, columns) and buffer.data.ptr % 128 == 0 and x.strides[1] == 4
    padded = -(-columns // 128) * 128
    args = (x, x.strides[0] // 4, buffer, operand.pitch, columns, padded, norm, float(eps), places, copies)
    launch(build(_OPERAND_FILES, defines={}).get("operand_half"), rows, 256, args)
    return operand


class Gemm:
    """out = or += alpha * (x @ W.T + bias), and gated products, on the current device.

    Args:
        types: tensor types of all matrices that will come; kernels are shared by sets of them.
        activation: of gated products.
    """

    def __init__(self, types: Sequence[GGMLType], activation: Activation) -> None:
        import cupy

        assert device_arch() == ARCH
        self.activation = activation
        self._families = {type: members for members in family(types) for type in members}
        self._multiprocessors = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        self._kernels: dict[tuple[tuple[GGMLType, ...], Tile, bool], tuple[Kernel, int]] = {}
        for members in family(types):
            for tile in TILES:
                self._kernel(members, tile)
        self._tables: dict[int, tuple[MatVec, list[tuple[Any, int, PackedMatrix]]]] = {}

    def __call__(
        self,
        group: MatVec,
        x: Operand,
        out: Any,
        *,
        bias: Any = None,
        add: bool = False,
        alpha: float = 1.0,
        tile: Tile | None = None,
        step: bool = False,
    ) -> None:
        """Multiplies T rows by the matrices of a group; their outputs follow each other.

        Args:
            group: the matrices, none paired.
            x: (T, K).
            out: float32 (T, >= group.width), rows contiguous, row stride free.
            bias: float32 (group.width,), added before alpha.
            add: add to out.
            alpha: factor of product + bias.
            tile: a shape to be used; chosen when left out.
            step: rows of a decode step, whose bits may depend on how many there are.
        """
        assert not group.paired and out.strides[1] == 4 and out.shape[0] >= x.rows and out.shape[1] >= group.width
        self._run(group, x, out, out.strides[0] // 4, bias, alpha, _ADD if add else _STORE, tile, step)

    def gated(
        self, group: MatVec, x: Operand, out: Any, *, tile: Tile | None = None, step: bool = False
    ) -> Operand | None:
        """activation(gate) * up of a paired matrix with F outputs.

        Args:
            group: the paired matrix.
            x: (T, K).
            out: uint8: room for an operand (T, F), which is returned (F a multiple of 128); or float32 (T, F).
            tile: a shape to be used; chosen when left out.
            step: see __call__.
        """
        assert group.paired and out.flags.c_contiguous
        if out.dtype.itemsize == 4:
            assert out.shape == (x.rows, group.width)
            self._run(group, x, out, group.width, None, 1.0, _GATED, tile, step)
            return None
        assert group.width % 128 == 0 and out.nbytes >= operand_bytes(x.rows, group.width)
        hidden = Operand(out, x.rows, group.width)
        self._run(group, x, out, hidden.pitch, None, 1.0, _GATED_OPERAND, tile, step)
        return hidden

    def _run(
        self,
        group: MatVec,
        x: Operand,
        out: Any,
        stride: int,
        bias: Any,
        alpha: float,
        mode: int,
        tile: Tile | None,
        step: bool = False,
    ) -> None:
        assert x.columns == group.columns
        for table, units, first in self._launches(group):
            types = self._families[first.type]
            chunks = first.layout.chunks(first.columns)
            shape = tile or choose_tile(units, x.rows, first.columns, self._multiprocessors, step)
            kernel, shared = self._kernel(types, shape)
            together = shape.cluster * shape.parts
            assert chunks >= shape.parts
            clusters = min(_clusters(shape, units, x.rows), self._multiprocessors * shape.blocks // together)
            args = (table, units, chunks, x.data, x.pitch, x.rows, out, stride, bias, float(alpha), mode, None)
            launch(kernel, clusters * together, (shape.groups + 1) * 128, args, shared=shared)

    def experts(self, group: MatVec, x: Operand, out: Any, tiles: TokenTiles) -> None:
        """Multiplies each tile of rows by its own expert: x @ W_e.T, or activation(gate_e) * up_e of a paired matrix.

        Args:
            group: one matrix: E matrices of N outputs (pairs: F) below one another, N and 2 F multiples of 64.
            x: (P, K), P the places of all tiles.
            out: float32 (P, N), contiguous; of a paired matrix uint8: room for an operand (P, F).
            tiles: which rows belong to whom.
        """
        ((table, units, matrix),) = self._launches(group)
        shape, outputs = tiles.tile, group.width // tiles.n_experts
        assert units % tiles.n_experts == 0 and x.columns == group.columns and x.rows % shape.tokens == 0
        if group.paired:
            assert outputs % 128 == 0 and out.nbytes >= operand_bytes(x.rows, outputs)
            stride, mode = Operand(out, x.rows, outputs).pitch, _GATED_OPERAND
        else:
            assert out.shape == (x.rows, outputs) and out.flags.c_contiguous
            stride, mode = outputs, _STORE
        each = units // tiles.n_experts
        kernel, shared = self._kernel(self._families[matrix.type], shape, experts=True)
        clusters = tiles.most * -(-each // (shape.groups * shape.cluster))
        clusters = min(clusters, self._multiprocessors * shape.blocks // shape.cluster)
        chunks = matrix.layout.chunks(matrix.columns)
        args = (table, each, chunks, x.data, x.pitch, x.rows, out, stride, None, 1.0, mode, tiles.table)
        launch(kernel, clusters * shape.cluster, (shape.groups + 1) * 128, args, shared=shared)

    def _kernel(self, types: tuple[GGMLType, ...], tile: Tile, *, experts: bool = False) -> tuple[Kernel, int]:
        key = (types, tile, experts)
        if key not in self._kernels:
            files, defines = build_job(types, tile, self.activation, experts=experts)
            self._kernels[key] = (build(files, defines=defines).get("gemm"), shared_bytes(types, tile))
        return self._kernels[key]

    def _launches(self, group: MatVec) -> list[tuple[Any, int, PackedMatrix]]:
        """The launches of a group: device table of its segments, runs of 64 outputs, and one of the matrices."""
        if id(group) not in self._tables:
            import cupy

            launches, column = [], 0
            for types, run in groupby(group.matrices, lambda matrix: self._families[matrix.type]):
                matrices = list(run)
                table = np.zeros(len(matrices), _SEGMENT)
                for entry, matrix in zip(table, matrices, strict=True):
                    scale = 0 if matrix.scale is None else matrix.scale.data.ptr
                    entry["data"], entry["scale"], entry["tiles"] = matrix.data.data.ptr, scale, matrix.tiles
                    entry["rows"], entry["column"], entry["format"] = matrix.rows, column, types.index(matrix.type)
                    entry["chunk_bytes"] = matrix.layout.chunk_bytes
                    column += matrix.rows
                units = sum(-(-matrix.tiles // 4) for matrix in matrices)
                launches.append((cupy.asarray(table.view(np.uint8)), units, matrices[0]))
            self._tables[id(group)] = (group, launches)
        return self._tables[id(group)][1]
