"""Tile shapes of the products of prompt rows on Hopper (gemm.cu), which of them is fastest, and how they are built.

Letters: T rows (tokens), K columns (inputs), N outputs. Needs no GPU. Must not know of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from engine.cuda.driver.compiler import shared_limit
from engine.cuda.formats.layouts import LAYOUTS
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.types import GGMLType

Job = tuple[tuple[str, ...], dict[str, object]]
"""Kernel files and defines, for compiler.prebuild."""

ARCH = 90
"""The compute capability the kernel is written for; no other has its instructions."""

MAX_FORMATS = 2
"""Formats of one kernel: with three, ptxas no longer keeps multiplications in flight in the larger tiles."""

_FILES = (
    "formats.cuh",
    "formats_coded.cuh",
    "half_pairs.cuh",
    "gemm_unpack.cuh",
    "hopper.cuh",
    "activation.cuh",
    "gemm.cu",
)
OPERAND_FILES = ("operand.cu",)


@dataclass(frozen=True)
class Tile:
    """Shape of what a block computes at once.

    Attributes:
        groups: warpgroups that multiply, 64 outputs each.
        tokens: rows of x.
        cluster: blocks that share their rows of x.
        blocks: blocks of a multiprocessor.
        column: nanoseconds per column of a matrix, measured on an H200 with Q4_K and Q6_K.
        crowded: the same where more than half of the multiprocessors have a block.
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
    Tile(1, 16, 1, 2, 3.0, 4.35, 1500),
    Tile(1, 64, 1, 2, 3.7, 5.8, 3000),
    Tile(1, 128, 1, 1, 4.1, 4.1, 3800),
    Tile(2, 64, 2, 1, 5.2, 5.2, 2000),
    Tile(2, 128, 2, 1, 6.0, 6.0, 3000),
    Tile(3, 128, 2, 1, 8.8, 8.8, 4000),
    Tile(2, 256, 2, 1, 10.0, 10.0, 6500),
)
"""Shapes for prompts. All give the same bits: each output is one chain of sums over all columns."""

STEP_TILES = (
    Tile(2, 96, 2, 1, 5.6, 5.6, 2500),
    Tile(2, 192, 2, 1, 8.0, 8.0, 4800),
    Tile(2, 96, 1, 1, 5.6, 5.6, 5700, parts=2),
    Tile(2, 64, 1, 1, 4.7, 4.7, 5500, parts=2),
    Tile(2, 128, 1, 1, 6.0, 6.0, 6000, parts=2),
    Tile(2, 128, 1, 1, 6.0, 6.0, 8500, parts=3),
)
"""Further shapes, for decode steps of more than 64 rows.

Numbers of rows between those of prompts' tiles. And a matrix of few outputs has fewer tiles than the card has
multiprocessors; blocks that share the columns of a tile use the others, which changes the order of sums.
"""

_CLUSTERS = {1: 1.0, 2: 1.0, 3: 0.9}
"""Share of the multiprocessors that clusters of so many blocks can cover."""

EXPERT_TILES = (*(Tile(4, tokens, 1, 1, 0.0, 0.0, 0.0) for tokens in (16, 32, 64)), TILES[4])
"""Shapes for products of experts, in ascending tokens. experts/prefill.py chooses by the rows of an expert, not time.

Four warpgroups: an expert has few rows, so most of the work is to unpack its weights."""


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


def build_job(types: Sequence[GGMLType], tile: Tile, activation: KernelActivation, *, experts: bool = False) -> Job:
    """The (files, defines) pair of the kernel of one tile shape for a family of types, for compiler.prebuild."""
    memory = _memory(types, tile)
    defines: dict[str, object] = {
        "EXPERTS": int(experts),
        "ACTIVATION": int(activation),
        "WGS": tile.groups,
        "TOKENS": tile.tokens,
        "CLUSTER": tile.cluster,
        "PARTS": tile.parts,
        "BLOCKS": tile.blocks,
        "REGISTERS": {1: 128, 2: 232, 3: 160, 4: 112}[tile.groups],
        "CHUNK": LAYOUTS[types[0]].chunk_columns,
        "W_STAGES": memory.weight_stages,
        "X_STAGES": memory.x_stages,
        "SLOT": _slot(types),
        "FORMATS": len(types),
    }
    defines |= {f"FORMAT{i}": type.name for i, type in enumerate(types)}
    return _FILES, defines


def build_jobs(types: Sequence[GGMLType], activation: KernelActivation) -> list[Job]:
    """All (files, defines) pairs that products of a model with these types need, for compiler.prebuild."""
    return [(OPERAND_FILES, {})] + [build_job(members, tile, activation) for members in family(types) for tile in TILES]


def expert_jobs(types: Sequence[GGMLType], needed: Sequence[GGMLType], activation: KernelActivation) -> list[Job]:
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
        step: rows of a decode step, whose bits may depend on how many there are.
    """
    parts = [tile for tile in STEP_TILES if columns >= 512 * tile.parts] if step else []
    return min((*TILES, *parts), key=lambda tile: _nanoseconds(tile, units, tokens, columns, multiprocessors))


def _nanoseconds(tile: Tile, units: int, tokens: int, columns: int, multiprocessors: int) -> float:
    """Estimated time: whole rounds of tiles over the card, and what is left."""
    at_once = int(multiprocessors * tile.blocks * _CLUSTERS[tile.parts]) // (tile.cluster * tile.parts)
    columns = columns // tile.parts
    rounds, left = divmod(clusters_of(tile, units, tokens), at_once)
    last = 0.0 if not left else tile.column if 2 * left * tile.cluster <= multiprocessors else tile.crowded
    return columns * (rounds * tile.crowded + last) + (rounds + bool(left)) * tile.extra


def clusters_of(tile: Tile, units: int, tokens: int) -> int:
    """Clusters of blocks that a product takes."""
    return -(-tokens // tile.tokens) * -(-units // (tile.groups * tile.cluster))


def operand_bytes(rows: int, columns: int) -> int:
    """Bytes of an Operand."""
    return -(-rows // 8) * 8 * -(-columns // 128) * 256
