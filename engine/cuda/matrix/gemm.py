"""Products of many rows on Hopper: packed weights unpacked in registers, multiplied by wgmma. Launches gemm.cu.

Letters: T rows (tokens), K columns (inputs), N outputs. A result's bits do not depend on the other rows or on the row's
place; nor on T or on the tile shape, unless blocks share the columns of a tile, as they may in decode steps. Must not
know of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.compiler import Kernel, build, device_arch
from engine.cuda.driver.launch import launch
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.matrix.gemm_plan import (
    ARCH,
    OPERAND_FILES,
    TILES,
    Tile,
    build_job,
    choose_tile,
    clusters_of,
    family,
    operand_bytes,
    shared_bytes,
)
from engine.cuda.matrix.linear import MatrixGroup
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.types import GGMLType

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


@dataclass(frozen=True, eq=False)
class Operand:
    """Rows of x as float16 in the order of operand.cu.

    Attributes:
        data: uint8, on the device, at least operand_bytes(rows, columns).
        rows: T.
        columns: K.
    """

    data: DeviceArray
    rows: int
    columns: int

    @property
    def pitch(self) -> int:
        """Rows that each block of 64 columns has room for."""
        return -(-self.rows // 8) * 8


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
    table: DeviceArray
    n_experts: int


def make_operand(
    x: DeviceArray,
    buffer: DeviceArray,
    *,
    norm: DeviceArray | None = None,
    eps: float = 0.0,
    places: DeviceArray | None = None,
    copies: int = 1,
    weights: DeviceArray | None = None,
    room_rows: int | None = None,
) -> Operand:
    """x or RMSNorm(x) * norm as an operand.

    Args:
        x: float32 (T, K), rows contiguous.
        buffer: uint8, contiguous, 1024-byte aligned, at least operand_bytes(T, K) long, overwritten.
        norm: float32 (K,) or None.
        eps: the norm's epsilon.
        places: int32 (T, copies), the rows of the operand that each row goes to, -1 for none; None: its own.
        copies: of each row.
        weights: float32 (T, copies), what each copy is multiplied by; None: by 1.
        room_rows: rows of the operand; T when left out.
    """
    rows, columns = (int(n) for n in x.shape)
    operand = Operand(buffer, rows if room_rows is None else room_rows, columns)
    assert buffer.nbytes >= operand_bytes(operand.rows, columns) and buffer.data.ptr % 128 == 0 and x.strides[1] == 4
    padded = -(-columns // 128) * 128
    args = (x, x.strides[0] // 4, buffer, operand.pitch, columns, padded, norm, float(eps), places, copies, weights)
    launch(build(OPERAND_FILES, defines={}).get("operand_half"), rows, 256, args)
    return operand


class Gemm:
    """out = or += alpha * (x @ W.T + bias), and gated products, on the current device.

    Args:
        types: tensor types of all matrices that will come; kernels are shared by sets of them.
        activation: of gated products.
    """

    def __init__(self, types: Sequence[GGMLType], activation: KernelActivation) -> None:
        import cupy

        assert device_arch() == ARCH
        self.activation = activation
        self._families = {type: members for members in family(types) for type in members}
        self._multiprocessors = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        self._kernels: dict[tuple[tuple[GGMLType, ...], Tile, bool], tuple[Kernel, int]] = {}
        for members in family(types):
            for tile in TILES:
                self._kernel(members, tile)
        self._tables: dict[int, tuple[MatrixGroup, list[tuple[DeviceArray, int, PackedMatrix]]]] = {}

    def __call__(
        self,
        group: MatrixGroup,
        x: Operand,
        out: DeviceArray,
        *,
        bias: DeviceArray | None = None,
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
        self, group: MatrixGroup, x: Operand, out: DeviceArray, *, tile: Tile | None = None, step: bool = False
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
        group: MatrixGroup,
        x: Operand,
        out: DeviceArray,
        stride: int,
        bias: DeviceArray | None,
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
            clusters = min(clusters_of(shape, units, x.rows), self._multiprocessors * shape.blocks // together)
            args = (table, units, chunks, x.data, x.pitch, x.rows, out, stride, bias, float(alpha), mode, None)
            launch(kernel, clusters * together, (shape.groups + 1) * 128, args, shared=shared)

    def experts(self, group: MatrixGroup, x: Operand, out: DeviceArray, tiles: TokenTiles) -> None:
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

    def _launches(self, group: MatrixGroup) -> list[tuple[DeviceArray, int, PackedMatrix]]:
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


class Gemms:
    """The products of a model: one Gemm for each activation between gate and up.

    Args:
        types: tensor types of all matrices that will come; () where no product comes here.
        activations: of gated products; the kernels of the first also serve products without one.
    """

    def __init__(self, types: Sequence[GGMLType], activations: Sequence[KernelActivation]) -> None:
        self.gated = {activation: Gemm(types, activation) for activation in activations} if types else {}

    @property
    def plain(self) -> Gemm:
        """For products without an activation."""
        return next(iter(self.gated.values()))
