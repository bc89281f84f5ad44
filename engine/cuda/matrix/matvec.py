"""Launcher of the quantized matrix-vector kernel (matvec.cu): the contract of every projection in decoding.

Letters: B sequences, K columns (inputs), N rows (outputs). One launch multiplies a group of matrices with the same
input, of any mix of types: q, k and v; gate and up; one output projection; the head. Given scratch memory for its
operand, a MatVec takes the family for many sequences (batch_matvec.py) where card and types allow. Must not know of
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import groupby
from typing import Any

from engine.cuda.driver.compiler import Kernel, build, device_arch, shared_limit
from engine.cuda.driver.launch import launch
from engine.cuda.formats.grid_tables import grid_bytes
from engine.cuda.formats.layouts import LAYOUTS, tile_count
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.matrix import decode_gemm as batch_matvec
from engine.gguf.types import GGMLType

_FILES = (
    "formats.cuh",
    "formats_coded.cuh",
    "hopper.cuh",
    "activation.cuh",
    "matvec_tile.cuh",
    "segments.cuh",
    "matvec.cu",
)
MAX_MATRICES = 4
MAX_COLUMNS = 8
SLAB = 4096
BATCH_ROWS = 3
"""From so many sequences on the family for many is the faster one (H200, all products of a step, 8B and 1B Q4_K_M)."""
UNQUANTIZED = frozenset((GGMLType.F32, GGMLType.F16, GGMLType.BF16))


class Activation(IntEnum):
    """Elementwise function of the output; with a paired matrix, of the gate: out = f(gate) * up."""

    NONE = 0
    SILU = 1
    GELU_TANH = 2
    GELU_ERF = 3
    RELU = 4
    RELU_SQUARED = 5
    SWIGLU_CLAMPED = 6  # bends up as well: no product folds it in


@dataclass(frozen=True)
class Tuning:
    """Shape of a block.

    Attributes:
        warps: warps of a block.
        split: warps that share the columns of one tile; warps / split is 1, 2 or 4. It decides the order of sums.
        depth: chunks a warp keeps in flight.
        blocks: blocks that registers leave room for on a multiprocessor.
        early: chunks of them fetched before the previous kernel has ended; more would delay this kernel's input.
    """

    warps: int
    split: int
    depth: int
    blocks: int = 1
    early: int = 1


def _profile(batch: int) -> tuple[int, int]:
    """(sequences per mma, column groups) of the kernel that serves a batch."""
    return {1: (1, 1), 2: (2, 1), 3: (4, 1), 4: (4, 1)}.get(batch, (4, 2))


def _fixed_bytes(tuning: Tuning, slot: int, sequences: int) -> int:
    """Shared memory beside the activations: ring, sums of squares, partial sums, barriers."""
    teams = tuning.warps // tuning.split
    ring = tuning.warps * tuning.depth * slot
    return (
        ring
        + tuning.split * sequences * 16
        + teams * (2 * tuning.split + 1) * sequences * 64
        + tuning.warps * tuning.depth * 8
    )


def _input_bytes(types: Sequence[GGMLType], columns: int, sequences: int) -> int:
    """Shared memory of the activations, 128 at a time: two bytes each, a scale per 32, a sum per 16; or halfs."""
    quads = -(-columns // 128)
    return quads * sequences * (528 if types[0] in UNQUANTIZED else 304)


def max_batch(arch: int) -> int:
    """Most sequences of one launch: as many as shared memory has room for, a slab of each."""
    limit = shared_limit(arch) // 1024
    return MAX_COLUMNS if limit >= 160 else 4 if limit >= 96 else 2


def choose_split(rows_of_tiles: int, columns: int, multiprocessors: int) -> int:
    """Warps that share one tile of a matrix: 8, or 4 where 8 would have too little to do or leave half of them idle.

    Measured on an H200 with 16 warps: 4 is 7-12 % faster for 6144x4096, 3072x2048, 16384x2048 and 128256x2048, and
    3-9 % slower for 4096x4096, 28672x4096, 128256x4096 and 4096x14336.
    """
    small = columns <= 2048 and rows_of_tiles > multiprocessors
    uneven = 2 * multiprocessors < rows_of_tiles <= 4 * multiprocessors
    return 4 if small or uneven else 8


def choose_tuning(types: Sequence[GGMLType], batch: int, arch: int, split: int = 8) -> Tuning:
    """The largest block that fits the card's shared memory with one slab of input."""
    nb, groups = _profile(batch)
    slot = max(LAYOUTS[type].chunk_bytes for type in types)
    limit = shared_limit(arch) - 2048 - grid_bytes(types)
    wide = slot > 3500
    most = max_batch(arch)
    # The most sequences decide the order of sums, so that every batch has the same.
    split = split if batch == most else choose_tuning(types, most, arch, split).split
    for warps, depth in ((16, 2), (8, 3), (8, 2), (8, 1), (4, 2), (4, 1), (2, 1)):
        if wide and warps == 16:
            continue
        tuning = Tuning(warps, min(warps, split), depth)
        if _fixed_bytes(tuning, slot, nb * groups) + _input_bytes(types, SLAB, nb * groups) <= limit:
            return tuning
    raise AssertionError(f"no block of {types} for compute capability {arch}")


def _resident_bytes(types: Sequence[GGMLType], tuning: Tuning, columns: int, sequences: int) -> int:
    """Shared memory of a block that keeps all of its inputs."""
    teams = tuning.warps // tuning.split
    slot = max(LAYOUTS[type].chunk_bytes for type in types)
    return _fixed_bytes(tuning, slot, sequences) + _input_bytes(types, columns, sequences) + teams * sequences * 64


def is_resident(types: Sequence[GGMLType], columns: int, batch: int, arch: int, tuning: Tuning | None = None) -> bool:
    """Whether a block keeps all inputs in shared memory, or one slab of them at a time."""
    nb, groups = _profile(batch)
    tuning = tuning or choose_tuning(types, batch, arch)
    return _resident_bytes(types, tuning, columns, nb * groups) <= shared_limit(arch) - 1024 - grid_bytes(types)


def build_job(
    types: Sequence[GGMLType],
    batch: int,
    arch: int,
    tuning: Tuning | None = None,
    *,
    columns: int = SLAB,
    resident: bool = True,
    paired: bool = False,
    activation: Activation = Activation.NONE,
) -> tuple[tuple[str, ...], dict[str, object]]:
    """The (files, defines) pair of the kernel for matrices of these types and a batch size, for module.prebuild.

    Kernels differ by columns <= SLAB or not, and by whether all inputs stay in shared memory; see is_resident().
    """
    tuning = tuning or choose_tuning(types, batch, arch)
    nb, groups = _profile(batch)
    distinct = list(dict.fromkeys(types))
    defines: dict[str, object] = {
        "SEGMENTS": len(types),
        "NB": nb,
        "GROUPS_OF_NB": groups,
        "WARPS": tuning.warps,
        "SPLIT": tuning.split,
        "DEPTH": tuning.depth,
        "BLOCKS": tuning.blocks,
        "EARLY": min(tuning.early, tuning.depth),
        "RESIDENT": int(resident),
        "ONE_SLAB": int(columns <= SLAB),
        "PAIRED": int(paired),
        "ACTIVATION": int(activation),
        "SLOT": -(-max(LAYOUTS[type].chunk_bytes for type in types) // 16) * 16,
        "FORMATS": len(distinct),
        "FORMAT_OF": "{" + ", ".join(str(distinct.index(type)) for type in types) + "}",
        "CHUNK_BYTES_OF": "{" + ", ".join(str(LAYOUTS[type].chunk_bytes) for type in types) + "}",
        "CHUNK_COLUMNS_OF": "{" + ", ".join(str(LAYOUTS[type].chunk_columns) for type in types) + "}",
    }
    if grid_bytes(types):
        defines["SHARED_GRIDS"] = 1
    for i, type in enumerate(distinct):
        defines[f"FORMAT{i}"] = type.name
    return _FILES, defines


def kernel_job(
    types: Sequence[GGMLType],
    tiles: int,
    columns: int,
    batch: int,
    card: tuple[int, int],
    *,
    tuning: Tuning | None = None,
    paired: bool = False,
    activation: Activation = Activation.NONE,
) -> tuple[tuple[tuple[str, ...], dict[str, object]], Tuning]:
    """The build job and the tuning a MatVec of these matrices takes on a card (compute capability, multiprocessors)."""
    arch, multiprocessors = card
    batch = min(batch, max_batch(arch))
    tuning = tuning or choose_tuning(types, batch, arch, choose_split(tiles, columns, multiprocessors))
    resident = is_resident(types, columns, batch, arch, tuning)
    job = build_job(
        types, batch, arch, tuning, columns=columns, resident=resident, paired=paired, activation=activation
    )
    return job, tuning


def group_jobs(
    matrices: Sequence[tuple[GGMLType, int]],
    columns: int,
    batches: Sequence[int],
    card: tuple[int, int],
    *,
    paired: bool = False,
    activation: Activation = Activation.NONE,
    batch_rows: int = BATCH_ROWS,
) -> list[tuple[tuple[str, ...], dict[str, object]]]:
    """The build jobs of a MatVec over (type, rows) matrices for several batch sizes, for module.prebuild.

    Batches of batch_rows and more are those that will be given scratch memory for operands.
    """
    jobs = []
    every = [type for type, _ in matrices]
    if batch_matvec.supported(every, card[0]) and max(batches) >= batch_rows:
        split = batch_matvec.group_split(matrices, columns, card[1], paired=paired)
        jobs = [batch_matvec.operand_job()] + [
            batch_matvec.kernel_job(every, split, columns, batch, paired=paired, activation=activation, ready=ready)
            for batch in batches
            for ready in (False, True)
            if batch >= batch_rows and (batch > batch_matvec.FEW_ROWS or not ready)
        ]
        # Short prompts come without an operand: one row, or filled up to the largest launch.
        batches = [batch for batch in batches if batch < batch_rows or batch in (1, MAX_COLUMNS)]
    for _, run in groupby(matrices, lambda matrix: matrix[0] in UNQUANTIZED):
        group = list(run)
        types = [type for type, _ in group]
        tiles = sum(tile_count(rows, paired=paired) for _, rows in group)
        for batch in batches:
            jobs.append(kernel_job(types, tiles, columns, batch, card, paired=paired, activation=activation)[0])
    return jobs


@cache
def _multiprocessors(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


class MatVec:
    """out = f(alpha * (norm(x) @ W.T + bias)), or out += ..., for a group of matrices W on the current device.

    Bits of a sequence's result do not depend on the other sequences, on B, or on the run.

    Args:
        matrices: 1 to 4 packed matrices with the same columns K; their outputs follow each other in `out`. A paired
            matrix must be alone.
        tuning: shape of the blocks; chosen for the card when left out.
    """

    def __init__(self, matrices: Sequence[PackedMatrix], *, tuning: Tuning | None = None) -> None:
        import cupy

        assert 1 <= len(matrices) <= MAX_MATRICES
        assert len({m.columns for m in matrices}) == 1
        assert len(matrices) == 1 or not any(m.paired for m in matrices)
        self.matrices = tuple(matrices)
        self.columns = matrices[0].columns
        self.width = sum(m.rows for m in matrices)
        self.paired = matrices[0].paired
        self._arch = device_arch()
        self._multiprocessors = _multiprocessors(cupy.cuda.Device().id)
        self._tuning = tuning
        self._kernels: dict[tuple[int, int, Activation], tuple[Kernel, Tuning]] = {}
        self._segments: list[Any] = []
        tile, column = 0, 0
        for matrix in matrices:
            tile += matrix.tiles
            self._segments += [matrix.data, matrix.scale, tile, matrix.rows, column]
            column += matrix.rows
        self._tiles = tile
        self._batch = None
        if batch_matvec.supported([m.type for m in matrices], self._arch):
            self._batch = batch_matvec.DecodeGemm(matrices, self._multiprocessors)
        self.n_bytes = sum(m.data.nbytes for m in matrices)
        # Quantized and unquantized matrices take their input in different forms: a launch for each run of one kind.
        self._parts: list[MatVec] = []
        runs = [list(run) for _, run in groupby(self.matrices, lambda matrix: matrix.type in UNQUANTIZED)]
        if len(runs) > 1:
            self._parts = [MatVec(run, tuning=tuning) for run in runs]

    @property
    def emits(self) -> bool:
        """Whether it can leave its outputs as the operand of a later product."""
        return self._batch is not None and self._batch.emits

    def prepare(self, batch: int, activation: Activation = Activation.NONE) -> None:
        """Builds and loads the kernels of a batch size and activation, so that a call without an operand does not."""
        for part in self._parts:
            part.prepare(batch, activation)
        if self._parts:
            return
        self._kernel(min(batch, max_batch(self._arch)), activation)

    def _kernel(self, batch: int, activation: Activation) -> tuple[Kernel, Tuning]:
        key = (*_profile(batch), activation)
        found = self._kernels.get(key)
        if found is None:
            (files, defines), tuning = kernel_job(
                [m.type for m in self.matrices],
                self._tiles,
                self.columns,
                batch,
                (self._arch, self._multiprocessors),
                tuning=self._tuning,
                paired=self.paired,
                activation=activation,
            )
            found = self._kernels[key] = (build(files, defines=defines).get("matvec"), tuning)
        return found

    def __call__(
        self,
        x: Any,
        out: Any,
        *,
        norm: Any = None,
        eps: float = 0.0,
        bias: Any = None,
        activation: Activation = Activation.NONE,
        add: bool = False,
        alpha: float = 1.0,
        operand: Any = None,
        ready: bool = False,
        emitted: tuple[Any, Any] | None = None,
        stream: Any = None,
        pdl: bool = True,
    ) -> None:
        """Launches the product for B sequences: 8 at a time, with an operand 64.

        Args:
            x: float32 (B, K), rows contiguous.
            out: float32 (B, >= width), rows contiguous; must not overlap x.
            norm: float32 (K,) weight of an RMSNorm (Zhang and Sennrich 2019) over K applied to x first; None for none.
            eps: the norm's epsilon.
            bias: float32 (width,), added to the product, in the order of the outputs; not with a paired matrix.
            activation: see Activation.
            add: add to out instead of overwriting it (the residual stream); not with an activation.
            alpha: factor of product + bias, before the activation.
            operand: uint8 scratch memory of batch_matvec.operand_bytes(K), of this stream alone: the family for many
                sequences where it exists. The two families round differently; each gives a sequence the same bits in
                every batch.
            ready: the operand holds norm(x) already, see DecodeGemm.
            emitted: where to leave another operand, see DecodeGemm.
            stream: a CuPy stream, may be under capture; the current one when left out.
            pdl: start early (programmatic dependent launch): weights are fetched before the previous kernel ends.
        """
        n = int(x.shape[0])
        assert x.shape[1] == self.columns
        assert out.shape[0] >= n
        assert out.shape[1] >= self.width
        assert x.strides[1] == out.strides[1] == 4
        if operand is not None and self._batch is not None:
            self._batch(
                x,
                out,
                operand,
                norm=norm,
                eps=eps,
                bias=bias,
                activation=activation,
                add=add,
                alpha=alpha,
                ready=ready,
                emitted=emitted,
                stream=stream,
                pdl=pdl,
            )
            return
        assert emitted is None
        column = 0
        for part in self._parts:
            end = column + part.width
            part(
                x,
                out[:, column:end],
                norm=norm,
                eps=eps,
                bias=None if bias is None else bias[column:end],
                activation=activation,
                add=add,
                alpha=alpha,
                stream=stream,
                pdl=pdl,
            )
            column = end
        if self._parts:
            return
        most = max_batch(self._arch)
        for first in range(0, n, most):
            batch = min(most, n - first)
            kernel, tuning = self._kernel(batch, activation)
            self._launch(
                kernel,
                tuning,
                batch,
                (
                    x[first:] if first else x,
                    x.strides[0] // 4,
                    norm,
                    float(eps),
                    bias,
                    out[first:] if first else out,
                    out.strides[0] // 4,
                    int(add),
                    float(alpha),
                ),
                stream,
                pdl,
            )

    def _launch(
        self, kernel: Kernel, tuning: Tuning, batch: int, args: tuple[Any, ...], stream: Any, pdl: bool
    ) -> None:
        nb, groups = _profile(batch)
        sequences = nb * groups
        teams = tuning.warps // tuning.split
        slot = max(m.layout.chunk_bytes for m in self.matrices)
        grid = min(self._multiprocessors, self._tiles)
        types = [m.type for m in self.matrices]
        whole = _resident_bytes(types, tuning, self.columns, sequences)
        limit = shared_limit(self._arch) - 1024
        if whole > limit:
            tiles_per_team = -(-self._tiles // (grid * teams))
            sums = teams * tiles_per_team * sequences * 64
            whole = _fixed_bytes(tuning, slot, sequences) + _input_bytes(types, SLAB, sequences) + sums
            whole += teams * sequences * 64
            assert whole <= limit, f"{self._tiles} tiles of {self.columns} columns exceed the shared memory"
        unit = 256 if self.columns % 256 == 0 else 128
        launch(
            kernel,
            grid,
            tuning.warps * 32,
            (*self._segments, self._tiles, self.columns, unit, batch, *args, 1.0 / self.columns),
            shared=whole,
            stream=stream,
            pdl=pdl,
        )
