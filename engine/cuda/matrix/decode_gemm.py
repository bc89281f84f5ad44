"""Launcher of the products of many sequences (decode_gemm.cu): packed weights, read once for up to 64 rows.

Letters: B sequences, K columns (inputs), N rows (outputs). Needs a Hopper GPU (wgmma). The contract of the results is
matvec.MatVec's; this family has float16 inputs (times a power of two per sequence) and sums in float32. Bits of a
sequence's result do not depend on the other sequences, on B, or on the run. Must not know of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.cuda.driver.compiler import Kernel, build, shared_limit
from engine.cuda.driver.launch import launch
from engine.cuda.formats.layouts import LAYOUTS, tile_count
from engine.cuda.formats.repack import PackedMatrix
from engine.gguf.types import GGMLType

_FORMAT_FILES = ("formats.cuh", "formats_coded.cuh", "formats_half.cuh")
_FILES = (
    *_FORMAT_FILES,
    "hopper.cuh",
    "activation.cuh",
    "decode_gemm_convert.cuh",
    "decode_gemm_wgmma.cuh",
    "segments.cuh",
    "decode_gemm.cu",
)
_OPERAND_FILES = ("decode_gemm_convert.cuh", "decode_gemm_operand.cu")
MAX_ROWS = 64
"""Sequences of one launch; more take several, each of which reads the weights."""
CHUNK = 256
"""Columns of a stage."""
UNIT_TILES = 4
"""Tiles of 16 rows that one warp group multiplies at a time."""
_OPERAND_BYTES = 17 * 256 + 64
"""Bytes of 256 columns of 8 sequences: 16 steps of 16 columns and the sums, 256 bytes each; two floats per sequence."""
_MAX_STAGES = 6
_CLUSTERS = {1: 132, 2: 66, 4: 30, 6: 17, 8: 15}
_RESIDENT_ROWS, _RESIDENT_ITEMS = 4, 40
"""Sequences, and pairs of a sequence and 256 columns, up to which a block converts by itself; else a kernel does."""
_EARLY = 1
"""Stages fetched before the input: more of them would delay it."""
_WARP_PRODUCTS = 2
"""Groups of 8 sequences up to which warps multiply one by one."""
FEW_ROWS = 8 * _WARP_PRODUCTS
"""Sequences up to which operands are not handed over: the first weights are what a product waits for."""
_ARCH = 90
UNSUPPORTED = frozenset((GGMLType.F32, GGMLType.Q2_K))
"""F32 would not fit float16; of Q2_K the minimums stand per 16 columns."""

Job = tuple[tuple[str, ...], dict[str, object]]


def supported(types: Sequence[GGMLType], arch: int) -> bool:
    """Whether matrices of these types can be multiplied by this family on a compute capability."""
    return arch == _ARCH and not UNSUPPORTED.intersection(types)


def operand_bytes(columns: int) -> int:
    """Bytes of the scratch memory of products of K columns: halves of MAX_ROWS rows, sums, scales."""
    return -(-columns // CHUNK) * _OPERAND_BYTES * MAX_ROWS // 8


@dataclass(frozen=True)
class Split:
    """How a product is cut into blocks, by the matrices and the card alone.

    Attributes:
        units: units of 64 rows in a block.
        cluster: blocks that share the columns of the same rows; it decides the order of sums.
        tiles: tiles in a block of few sequences, whose warps multiply one by one; 0: as many as the units have.
    """

    units: int
    cluster: int
    tiles: int = 0

    def tiles_of_block(self, groups: int) -> int:
        """Tiles of 16 rows in a block for so many groups of 8 sequences."""
        return self.tiles if self.tiles and groups <= _WARP_PRODUCTS else self.units * UNIT_TILES


def choose_split(units: int, chunks: int, multiprocessors: int) -> Split:
    """The cut whose busiest multiprocessor is done first.

    Measured on an H200: 256 columns take about 4 + units (of 0.17 us), an exchange of sums 12. A cluster needs its
    multiprocessors in one part of the card: 66, 30, 17 and 15 clusters of 2, 4, 6 and 8 blocks run at once on 132.
    """

    def cost(split: Split) -> tuple[int, int]:
        clusters = -(-units // split.units)
        waves = -(-clusters // max(1, _CLUSTERS[split.cluster] * multiprocessors // 132))
        exchange = 12 if split.cluster > 1 else 0
        return waves * (-(-chunks // split.cluster) * (4 + split.units) + exchange), split.cluster

    return min((Split(u, c) for u in (4, 2, 1) for c in _CLUSTERS if c <= max(1, chunks)), key=cost)


def _groups_of_eight(batch: int) -> int:
    """Groups of 8 sequences of the kernel that serves a batch: 1, 2, 4 or 8."""
    return next(n for n in (1, 2, 4, 8) if batch <= 8 * n)


@dataclass(frozen=True)
class _Memory:
    """Shared memory of a block: activations that stay, stages, how many of those."""

    tile: int
    stage: int
    stages: int
    resident: int

    @property
    def total(self) -> int:
        """With barriers and sums of squares."""
        return self.resident + self.stages * (self.stage + 16) + MAX_ROWS * 4


def _memory(types: Sequence[GGMLType], split: Split, batch: int, columns: int, *, ready: bool = False) -> _Memory:
    groups = _groups_of_eight(batch)
    tile = max(LAYOUTS[type].chunk_bytes * CHUNK // LAYOUTS[type].chunk_columns for type in types)
    limit = shared_limit(_ARCH) - 2048
    chunks = -(-columns // CHUNK)
    own = -(-chunks // split.cluster)
    weights, x = split.tiles_of_block(groups) * tile, groups * _OPERAND_BYTES
    # One item has no use for more stages than it has chunks.
    most = min(_MAX_STAGES, own) if split.cluster > 1 else _MAX_STAGES
    stages = min(most, (limit - own * x) // (weights + 16))
    few = batch <= _RESIDENT_ROWS and batch * own <= _RESIDENT_ITEMS
    if not ready and few and stages >= min(most, 2):
        memory = _Memory(tile, weights, stages, own * x)
    else:
        memory = _Memory(tile, weights + x, min(most, limit // (weights + x + 16)), 0)
    kept = -(-split.tiles_of_block(groups) // UNIT_TILES) * groups * 8 * 68 * 4
    missing = kept - memory.resident - memory.stages * memory.stage
    if split.cluster > 1 and missing > 0:  # blocks exchange their sums through the same memory
        memory = _Memory(tile, memory.stage, memory.stages + -(-missing // memory.stage), memory.resident)
    return memory


def fit(types: Sequence[GGMLType], split: Split) -> Split:
    """Fewer rows in a block where two stages of so many do not fit."""
    while split.units > 1 and _memory(types, split, MAX_ROWS, 1 << 20).stages < 2:
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
    ready: bool = False,
) -> Job:
    """The (files, defines) pair of the kernel of a batch size, for module.prebuild. ready: of its operand."""
    groups = _groups_of_eight(min(batch, MAX_ROWS))
    memory = _memory(types, split, min(batch, MAX_ROWS), columns, ready=ready)
    # A warp group alone leaves the tensor cores idle while it unpacks: four of them keep both busy. 64 sequences leave
    # them so few registers that the fetching warp group lends its own.
    crowded = groups == 8 and split.units == 4
    distinct = list(dict.fromkeys(types))
    defines: dict[str, object] = {
        "SEGMENTS": len(types),
        "NT": groups,
        "TILES": split.tiles_of_block(groups),
        "FETCHERS": 128 if crowded else 32,
        "WARP_PRODUCTS": _WARP_PRODUCTS,
        "CLUSTER": split.cluster,
        "STAGES": memory.stages,
        "EARLY": min(_EARLY, memory.stages),
        "STAGE": memory.stage,
        "TILE_STRIDE": memory.tile,
        "RESIDENT": int(memory.resident > 0),
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
    split = fit([type for type, _ in matrices], choose_split(units, -(-columns // CHUNK), multiprocessors))
    # Few sequences: the fewest tiles a block that take no more turns.
    at_once = max(1, _CLUSTERS[split.cluster] * multiprocessors // 132)
    turns = -(-units // (split.units * at_once))
    return replace(split, tiles=-(-units * UNIT_TILES // (turns * at_once)))


def operand_job() -> Job:
    """The (files, defines) pair of the kernel that prepares activations, for module.prebuild."""
    return _OPERAND_FILES, {}


class DecodeGemm:
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
        self._kernels: dict[tuple[int, int, int], tuple[Kernel, int, _Memory]] = {}
        self._segments: list[Any] = []
        unit, column = 0, 0
        for matrix in matrices:
            unit += -(-matrix.tiles // UNIT_TILES)
            self._segments += [matrix.data, matrix.scale, unit, matrix.tiles, matrix.rows, column]
            column += matrix.rows
        self._units = unit

    @property
    def emits(self) -> bool:
        """Whether a launch can leave its outputs as the operand of a later one: a cluster has 256 of them."""
        outputs = self.split.units * (32 if self._paired else 64)
        return len(self._types) == 1 and self.split.cluster > 1 and outputs == CHUNK

    def prepare(self, batch: int, activation: int = 0) -> None:
        """Builds and loads the kernels of a batch size and activation."""
        self._kernel(min(batch, MAX_ROWS), activation, ready=False)
        build(_OPERAND_FILES).get("batch_operand")

    def _kernel(self, batch: int, activation: int, *, ready: bool) -> tuple[Kernel, int, _Memory]:
        memory = _memory(self._types, self.split, batch, self._columns, ready=ready)
        key = (_groups_of_eight(batch), memory.resident, activation)
        found = self._kernels.get(key)
        if found is None:
            files, defines = kernel_job(
                self._types,
                self.split,
                self._columns,
                batch,
                paired=self._paired,
                activation=activation,
                ready=ready,
            )
            threads = int(str(defines["TILES"])) * 32 + int(str(defines["FETCHERS"]))
            found = self._kernels[key] = (build(files, defines=defines).get("batch_matvec"), threads, memory)
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
        ready: bool = False,
        emitted: tuple[Any, Any] | None = None,
        stream: Any = None,
        pdl: bool = True,
    ) -> None:
        """Launches the product for B sequences, up to 64 at a time.

        Args:
            x: float32 (B, K), rows contiguous.
            out: float32 (B, >= N), rows contiguous; must not overlap x.
            operand: uint8 scratch memory, at least operand_bytes(K), 128-byte aligned, of this stream alone.
            norm: float32 (K,) weight of an RMSNorm of x; None for none.
            eps: the norm's epsilon.
            bias: float32 (N,); not with a paired matrix.
            activation: matvec.Activation.
            add: add to out; not with an activation.
            alpha: factor of product + bias.
            ready: operand holds norm(x) already, left by an earlier product; more than FEW_ROWS, up to 64.
            emitted: weight of the norm that comes next, or None, and other memory of operand_bytes(N): there the
                outputs are left as an operand as well. Where emits, likewise.
            stream: a CuPy stream, may be under capture; the current one when left out.
            pdl: start early (programmatic dependent launch).
        """
        chunks = -(-self._columns // CHUNK)
        prepare = build(_OPERAND_FILES).get("batch_operand")
        assert (not ready and emitted is None) or FEW_ROWS < int(x.shape[0]) <= MAX_ROWS
        norm_of_emitted, emitted_operand = emitted or (None, None)
        for first in range(0, int(x.shape[0]), MAX_ROWS):
            batch = min(MAX_ROWS, int(x.shape[0]) - first)
            rows, target = (x[first:], out[first:]) if first else (x, out)
            groups = _groups_of_eight(batch)
            kernel, threads, memory = self._kernel(batch, activation, ready=ready)
            blocks = -(-self._units * UNIT_TILES // self.split.tiles_of_block(_groups_of_eight(batch)))
            if self.split.cluster > 1:
                grid = blocks * self.split.cluster
            else:  # as many as stay busy to the last turn
                grid = -(-blocks // -(-blocks // self._multiprocessors))
            if not memory.resident and not ready:
                launch(
                    prepare,
                    (chunks, -(-batch // 8)),
                    256,
                    (rows, x.strides[0] // 4, norm, self._columns, batch, groups, operand),
                    stream=stream,
                    pdl=pdl,
                )
            launch(
                kernel,
                grid,
                threads,
                (
                    *self._segments,
                    self._units,
                    blocks,
                    self._columns,
                    batch,
                    rows,
                    x.strides[0] // 4,
                    norm,
                    float(eps),
                    operand,
                    bias,
                    target,
                    out.strides[0] // 4,
                    int(add),
                    float(alpha),
                    norm_of_emitted,
                    emitted_operand,
                ),
                shared=memory.total,
                stream=stream,
                pdl=pdl,
            )
