"""Launcher of the products of many sequences (kernels/batch_matvec.cu): packed weights, read once for up to 64 rows.

Letters: B sequences, K columns (inputs), N rows (outputs). Needs a Hopper GPU (wgmma). The contract of the results is
matvec.MatVec's; this family has float16 inputs (times a power of two per sequence) and sums in float32. Bits of a
sequence's result do not depend on the other sequences, on B, or on the run. Must not know of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.cuda.launch import launch
from engine.cuda.layouts import LAYOUTS, tile_count
from engine.cuda.module import Kernel, build, shared_limit
from engine.cuda.repack import PackedMatrix
from engine.gguf.types import GGMLType

_FILES = ("formats.cuh", "formats_half.cuh", "batch_wgmma.cuh", "batch_matvec.cu")
_OPERAND_FILES = ("batch_operand.cu",)
MAX_ROWS = 64
"""Sequences of one launch; more take several, each of which reads the weights."""
CHUNK = 256
"""Columns of a stage."""
UNIT_TILES = 4
"""Tiles of 16 rows that one warp group multiplies at a time."""
_MAX_STAGES = 6
_ARCH = 90
UNSUPPORTED = frozenset((GGMLType.F32, GGMLType.Q2_K))
"""F32 would not fit float16; of Q2_K the minimums stand per 16 columns."""

Job = tuple[tuple[str, ...], dict[str, object]]


def supported(types: Sequence[GGMLType], arch: int) -> bool:
    """Whether matrices of these types can be multiplied by this family on a compute capability."""
    return arch == _ARCH and not UNSUPPORTED.intersection(types)


def operand_bytes(columns: int) -> int:
    """Bytes of the scratch memory of products of K columns: halves of MAX_ROWS rows, sums, a factor per row."""
    return -(-columns // CHUNK) * MAX_ROWS // 8 * 17 * 256 + MAX_ROWS * 4


@dataclass(frozen=True)
class Split:
    """How a product is cut into blocks, by the matrices and the card alone.

    Attributes:
        units: units of 64 rows in a block.
        cluster: blocks that share the columns of the same rows; it decides the order of sums.
    """

    units: int
    cluster: int


def choose_split(units: int, chunks: int, multiprocessors: int) -> Split:
    """The cut whose busiest multiprocessor has the least to do; among equals, most rows in a block.

    A block with partners pays about 1.5 units of 256 columns for exchanging sums.
    """

    def cost(split: Split) -> tuple[float, int]:
        blocks = -(-units // split.units) * split.cluster
        waves = -(-blocks // multiprocessors)
        exchange = 1.5 if split.cluster > 1 else 0.0
        return waves * (split.units * -(-chunks // split.cluster) + exchange), -split.units

    return min((Split(u, c) for u in (1, 2, 3, 4) for c in range(1, min(8, chunks) + 1)), key=cost)


def _groups_of_eight(batch: int) -> int:
    """Groups of 8 sequences of the kernel that serves a batch: 1, 2, 4 or 8."""
    return next(n for n in (1, 2, 4, 8) if batch <= 8 * n)


def _stage_bytes(types: Sequence[GGMLType], split: Split, groups: int) -> tuple[int, int]:
    """(bytes of a tile's 256 columns, bytes of a stage)."""
    tile = max(LAYOUTS[type].chunk_bytes * CHUNK // LAYOUTS[type].chunk_columns for type in types)
    return tile, groups * 17 * 256 + split.units * UNIT_TILES * tile


def _stages(types: Sequence[GGMLType], split: Split, groups: int, chunks: int) -> int:
    """Stages that fit; where blocks exchange sums, no more than a block has chunks, but room for the sums."""
    stage = _stage_bytes(types, split, groups)[1]
    stages = min(_MAX_STAGES, (shared_limit(_ARCH) - 2048) // stage)
    if split.cluster > 1:
        kept = split.units * groups * 8 * 68 * 4
        stages = min(stages, max(-(-chunks // split.cluster), -(-kept // stage)))
    return stages


def fit(types: Sequence[GGMLType], split: Split) -> Split:
    """Fewer rows in a block where two stages of so many do not fit."""
    while split.units > 1 and 2 * _stage_bytes(types, split, 8)[1] > shared_limit(_ARCH) - 2048:
        split = Split(split.units // 2, split.cluster)
    return split


def kernel_job(
    types: Sequence[GGMLType],
    split: Split,
    columns: int,
    batch: int,
    *,
    paired: bool = False,
    activation: int = 0,
) -> Job:
    """The (files, defines) pair of the kernel of a batch size, for module.prebuild."""
    groups = _groups_of_eight(min(batch, MAX_ROWS))
    tile, stage = _stage_bytes(types, split, groups)
    # 64 sequences take so many registers that two warp groups work on two units each, not four on one.
    units = 2 if groups == 8 and split.units == 4 else 1
    distinct = list(dict.fromkeys(types))
    defines: dict[str, object] = {
        "SEGMENTS": len(types),
        "NT": groups,
        "TEAMS": split.units // units,
        "UNITS": units,
        "CLUSTER": split.cluster,
        "STAGES": _stages(types, split, groups, -(-columns // CHUNK)),
        "STAGE": stage,
        "TILE_STRIDE": tile,
        "PAIRED": int(paired),
        "ACTIVATION": int(activation),
        "FORMATS": len(distinct),
        "FORMAT_OF": "{" + ", ".join(str(distinct.index(type)) for type in types) + "}",
        "CHUNK_BYTES_OF": "{" + ", ".join(str(LAYOUTS[type].chunk_bytes) for type in types) + "}",
        "CHUNK_COLUMNS_OF": "{" + ", ".join(str(LAYOUTS[type].chunk_columns) for type in types) + "}",
    }
    for i, type in enumerate(distinct):
        defines[f"FORMAT{i}"] = type.name
    return _FILES, defines


def group_split(
    matrices: Sequence[tuple[GGMLType, int]], columns: int, multiprocessors: int, *, paired: bool = False
) -> Split:
    """The split of (type, rows) matrices with the same input."""
    units = sum(-(-tile_count(rows, paired=paired) // UNIT_TILES) for _, rows in matrices)
    return fit([type for type, _ in matrices], choose_split(units, -(-columns // CHUNK), multiprocessors))


def operand_job() -> Job:
    """The (files, defines) pair of the kernel that prepares activations, for module.prebuild."""
    return _OPERAND_FILES, {}


class BatchMatVec:
    """out = f(alpha * (norm(x) @ W.T + bias)), or out += ..., for matrices W that share their input.

    Args:
        matrices: 1 to 4 packed matrices of supported() types; a paired one must be alone.
        multiprocessors: of the card.
        split: for experiments; chosen by the matrices when left out.
    """

    def __init__(self, matrices: Sequence[PackedMatrix], multiprocessors: int, split: Split | None = None) -> None:
        self._types = [m.type for m in matrices]
        self._columns = matrices[0].columns
        self._paired = matrices[0].paired
        self._multiprocessors = multiprocessors
        shapes = [(m.type, m.rows) for m in matrices]
        self.split = split or group_split(shapes, self._columns, multiprocessors, paired=self._paired)
        self._kernels: dict[tuple[int, int], tuple[Kernel, int]] = {}
        self._segments: list[Any] = []
        unit, column = 0, 0
        for matrix in matrices:
            unit += -(-matrix.tiles // UNIT_TILES)
            self._segments += [matrix.data, matrix.scale, unit, matrix.tiles, matrix.rows, column]
            column += matrix.rows
        self._units = unit

    def prepare(self, batch: int, activation: int = 0) -> None:
        """Builds and loads the kernels of a batch size and activation."""
        self._kernel(min(batch, MAX_ROWS), activation)
        build(_OPERAND_FILES).get("batch_operand")

    def _kernel(self, batch: int, activation: int) -> tuple[Kernel, int]:
        key = (_groups_of_eight(batch), activation)
        found = self._kernels.get(key)
        if found is None:
            files, defines = kernel_job(
                self._types, self.split, self._columns, batch, paired=self._paired, activation=activation
            )
            shared = int(str(defines["STAGES"])) * (int(str(defines["STAGE"])) + 16)
            threads = int(str(defines["TEAMS"])) * 128 + 32
            found = self._kernels[key] = (build(files, defines=defines).get("batch_matvec"), shared * 1024 + threads)
        return found

    def __call__(
        self,
        x: Any,
        out: Any,
        operand: Any,
        *,
        norm: Any = None,
        eps: float = 0.0,
        bias: Any = None,
        activation: int = 0,
        add: bool = False,
        alpha: float = 1.0,
        stream: Any = None,
        pdl: bool = True,
    ) -> None:
        """Launches the product; as MatVec.__call__, and:

        Args:
            operand: uint8 scratch memory, at least operand_bytes(K), 128-byte aligned, of this stream alone.
        """
        chunks = -(-self._columns // CHUNK)
        prepare = build(_OPERAND_FILES).get("batch_operand")
        blocks = -(-self._units // self.split.units)
        if self.split.cluster > 1:
            grid = blocks * self.split.cluster
        else:  # as many blocks as give none of them less than the others' last turn
            turns = -(-blocks // self._multiprocessors)
            grid = -(-blocks // turns)
        for first in range(0, int(x.shape[0]), MAX_ROWS):
            batch = min(MAX_ROWS, int(x.shape[0]) - first)
            rows, target = (x[first:], out[first:]) if first else (x, out)
            groups = _groups_of_eight(batch)
            factors = operand[chunks * groups * 17 * 256 :]
            launch(
                prepare,
                batch,
                256,
                (rows, x.strides[0] // 4, norm, float(eps), self._columns, groups, operand, factors),
                stream=stream,
                pdl=pdl,
            )
            kernel, packed = self._kernel(batch, activation)
            launch(
                kernel,
                grid,
                packed % 1024,
                (
                    *self._segments,
                    self._units,
                    blocks,
                    self._columns,
                    batch,
                    operand,
                    factors,
                    bias,
                    target,
                    out.strides[0] // 4,
                    int(add),
                    float(alpha),
                ),
                shared=packed // 1024,
                stream=stream,
                pdl=pdl,
            )
