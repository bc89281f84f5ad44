"""How the products of many sequences (decode_gemm.cu) are cut into blocks and built; needs no GPU.

Letters: B sequences, K columns (inputs), N rows (outputs). Must not know of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.cuda.driver.compiler import shared_limit
from engine.cuda.formats.layouts import LAYOUTS, tile_count
from engine.gguf.types import GGMLType

_FORMAT_FILES = ("formats.cuh", "formats_coded.cuh", "half_pairs.cuh", "formats_half.cuh")
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
HALF = CHUNK // 2
"""Columns of an operand that one cluster leaves where two share it."""
UNIT_TILES = 4
"""Tiles of 16 rows that one warp group multiplies at a time."""
_PAIR_OUTPUTS = 32
"""Outputs of a unit of a paired matrix."""
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
"""F32 would not fit float16; Q2_K has a minimum for every 16 columns."""

Job = tuple[tuple[str, ...], dict[str, object]]


def supported(types: Sequence[GGMLType], arch: int) -> bool:
    """Whether matrices of these types can be multiplied by this family on a compute capability."""
    return arch == _ARCH and not UNSUPPORTED.intersection(types)


def operand_bytes(columns: int) -> int:
    """Bytes of the scratch memory of products of K columns: halves of MAX_ROWS rows, sums, scales."""
    return -(-columns // CHUNK) * _OPERAND_BYTES * MAX_ROWS // 8


@dataclass(frozen=True)
class Cut:
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


def choose_cut(units: int, chunks: int, multiprocessors: int) -> Cut:
    """The cut whose busiest multiprocessor is done first.

    Measured on an H200: 256 columns take about 4 + units (of 0.17 us), an exchange of sums 12. A cluster needs its
    multiprocessors in one part of the card: 66, 30, 17 and 15 clusters of 2, 4, 6 and 8 blocks run at once on 132.
    """

    def cost(cut: Cut) -> tuple[int, int]:
        clusters = -(-units // cut.units)
        waves = -(-clusters // max(1, _CLUSTERS[cut.cluster] * multiprocessors // 132))
        exchange = 12 if cut.cluster > 1 else 0
        return waves * (-(-chunks // cut.cluster) * (4 + cut.units) + exchange), cut.cluster

    return min((Cut(u, c) for u in (4, 2, 1) for c in _CLUSTERS if c <= max(1, chunks)), key=cost)


def groups_of_eight(batch: int) -> int:
    """Groups of 8 sequences of the kernel that serves a batch: 1, 2, 4 or 8."""
    return next(n for n in (1, 2, 4, 8) if batch <= 8 * n)


@dataclass(frozen=True)
class BlockMemory:
    """Shared memory of a block: activations that stay, stages, how many of those."""

    tile: int
    stage: int
    stages: int
    resident: int

    @property
    def total(self) -> int:
        """With barriers and sums of squares."""
        return self.resident + self.stages * (self.stage + 16) + MAX_ROWS * 4


def block_memory(types: Sequence[GGMLType], cut: Cut, batch: int, columns: int, *, ready: bool = False) -> BlockMemory:
    """What a block of a batch size keeps. ready: the operand is there already, so no block converts its input."""
    groups = groups_of_eight(batch)
    tile = max(LAYOUTS[type].chunk_bytes * CHUNK // LAYOUTS[type].chunk_columns for type in types)
    limit = shared_limit(_ARCH) - 2048
    chunks = -(-columns // CHUNK)
    own = -(-chunks // cut.cluster)
    weights, x = cut.tiles_of_block(groups) * tile, groups * _OPERAND_BYTES
    # One item has no use for more stages than it has chunks.
    most = min(_MAX_STAGES, own) if cut.cluster > 1 else _MAX_STAGES
    stages = min(most, (limit - own * x) // (weights + 16))
    few = batch <= _RESIDENT_ROWS and batch * own <= _RESIDENT_ITEMS
    if not ready and few and stages >= min(most, 2):
        memory = BlockMemory(tile, weights, stages, own * x)
    else:
        memory = BlockMemory(tile, weights + x, min(most, limit // (weights + x + 16)), 0)
    kept = -(-cut.tiles_of_block(groups) // UNIT_TILES) * groups * 8 * 68 * 4
    missing = kept - memory.resident - memory.stages * memory.stage
    if cut.cluster > 1 and missing > 0:  # blocks exchange their sums through the same memory
        memory = BlockMemory(tile, memory.stage, memory.stages + -(-missing // memory.stage), memory.resident)
    return memory


def fit(types: Sequence[GGMLType], cut: Cut) -> Cut:
    """Fewer rows in a block where two stages of so many do not fit."""
    while cut.units > 1 and block_memory(types, cut, MAX_ROWS, 1 << 20).stages < 2:
        cut = Cut(cut.units // 2, cut.cluster)
    return cut


def kernel_job(
    types: Sequence[GGMLType],
    cut: Cut,
    columns: int,
    batch: int,
    *,
    paired: bool = False,
    activation: int = 0,
    ready: bool = False,
    halves: bool = False,
) -> Job:
    """The (files, defines) pair of the kernel of a batch size, for compiler.prebuild.

    ready: of its operand. halves: its outputs are left as an operand by halves, where emits_halves says so.
    """
    groups = groups_of_eight(min(batch, MAX_ROWS))
    memory = block_memory(types, cut, min(batch, MAX_ROWS), columns, ready=ready)
    # A warp group alone leaves the tensor cores idle while it unpacks: four of them keep both busy. 64 sequences leave
    # them so few registers that the fetching warp group lends its own.
    crowded = groups == 8 and cut.units == 4
    distinct = list(dict.fromkeys(types))
    defines: dict[str, object] = {
        "SEGMENTS": len(types),
        "NT": groups,
        "TILES": cut.tiles_of_block(groups),
        "FETCHERS": 128 if crowded else 32,
        "WARP_PRODUCTS": _WARP_PRODUCTS,
        "CLUSTER": cut.cluster,
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
    if not halves:
        return _FILES, defines
    assert batch > FEW_ROWS and paired and len(types) == 1 and cut.units * _PAIR_OUTPUTS == HALF
    return (*_FILES[:-1], "decode_gemm_halves.cuh", _FILES[-1]), defines | {"LEAVES_HALVES": 1}


def group_cut(
    matrices: Sequence[tuple[GGMLType, int]], columns: int, multiprocessors: int, *, paired: bool = False
) -> Cut:
    """The cut of (type, rows) matrices with the same input."""
    units = sum(-(-tile_count(rows, paired=paired) // UNIT_TILES) for _, rows in matrices)
    cut = fit([type for type, _ in matrices], choose_cut(units, -(-columns // CHUNK), multiprocessors))
    # Few sequences: the fewest tiles a block that take no more turns.
    at_once = max(1, _CLUSTERS[cut.cluster] * multiprocessors // 132)
    turns = -(-units // (cut.units * at_once))
    return replace(cut, tiles=-(-units * UNIT_TILES // (turns * at_once)))


def emits(types: Sequence[GGMLType], cut: Cut, *, paired: bool = False) -> bool:
    """Whether a launch can leave its outputs as the operand of a later one: a cluster has 256 of them."""
    outputs = cut.units * (_PAIR_OUTPUTS if paired else 64)
    return len(types) == 1 and cut.cluster > 1 and outputs == CHUNK


def emits_halves(types: Sequence[GGMLType], rows: int, cut: Cut, multiprocessors: int, *, paired: bool = False) -> bool:
    """Whether two clusters of a launch can leave a half each of 256 columns of a later product's operand.

    No norm may come between, and every cluster has a partner. A block alone finishes its outputs over its stages, which
    it does not fill again: it has no second turn.
    """
    if not paired or len(types) != 1 or cut.units * _PAIR_OUTPUTS != HALF:
        return False
    clusters = -(-tile_count(rows, paired=True) // (cut.units * UNIT_TILES))
    return clusters % 2 == 0 and (cut.cluster > 1 or clusters <= multiprocessors)


def word_count(columns: int) -> int:
    """Of the int32 words of an operand of K columns that is left by halves."""
    return -(-columns // CHUNK) * MAX_ROWS


def turns(n: int) -> list[int]:
    """Sequences of each launch of a product of n."""
    return [min(MAX_ROWS, n - first) for first in range(0, n, MAX_ROWS)]


def operand_job() -> Job:
    """The (files, defines) pair of the kernel that prepares activations, for compiler.prebuild."""
    return _OPERAND_FILES, {}
