"""How the matrix-vector kernel (matvec.cu) is built and laid over a card; needs no GPU.

Letters: B sequences, K columns (inputs), N rows (outputs). Must not know of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from engine.cuda.driver.compiler import shared_limit
from engine.cuda.formats.grid_tables import grid_bytes
from engine.cuda.formats.layouts import LAYOUTS
from engine.cuda.rows.activation import KernelActivation
from engine.errors import DeviceError
from engine.gguf.types import GGMLType

Job = tuple[tuple[str, ...], dict[str, object]]
"""Kernel files and defines, for compiler.prebuild."""

_FILES = (
    "formats.cuh",
    "formats_coded.cuh",
    "hopper.cuh",
    "activation.cuh",
    "matvec_input.cuh",
    "matvec_tile.cuh",
    "segments.cuh",
    "matvec.cu",
)
_OPERAND_FILES = ("matvec_input.cuh", "matvec_operand.cu")
_OPERAND_ARCH = 90
_OPERAND_SEQUENCES = 4
MAX_MATRICES = 4
MAX_COLUMNS = 8
SLAB = 4096
BATCH_ROWS = 3
"""From so many sequences on decode_gemm.py is faster (H200, all products of a step, 8B and 1B Q4_K_M)."""
QUANTIZED_BATCH_ROWS = 5
"""The same where every matrix is quantized."""
UNQUANTIZED = frozenset((GGMLType.F32, GGMLType.F16, GGMLType.BF16))


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


def sequence_groups(batch: int) -> tuple[int, int]:
    """(sequences per mma, column groups) of the kernel that serves a batch."""
    return {1: (1, 1), 2: (2, 1), 3: (4, 1), 4: (4, 1)}.get(batch, (4, 2))


@dataclass(frozen=True)
class Block:
    """How a product is laid over a card.

    Attributes:
        tuning: shape of a block.
        resident: a block keeps all inputs in shared memory; else one slab of them at a time, and the sums of all its
            tiles so far.
        shared_bytes: dynamic shared memory of a block.
    """

    tuning: Tuning
    resident: bool
    shared_bytes: int


def _fixed_bytes(tuning: Tuning, slot: int, sequences: int) -> int:
    """Ring, barriers, sums of squares, partial sums, norm factors, and scales that lanes leave for others."""
    teams = tuning.warps // tuning.split
    left = tuning.warps * 1024 if sequences >= 4 else 0
    ring = tuning.warps * tuning.depth * slot
    return (
        ring
        + left
        + tuning.split * sequences * 16
        + teams * (2 * tuning.split + 1) * sequences * 64
        + tuning.warps * tuning.depth * 8
    )


def input_bytes(types: Sequence[GGMLType], columns: int, sequences: int) -> int:
    """Shared memory of the activations, 128 at a time: two bytes each, a scale per 32, a sum per 16; or halves.

    Four sequences and more also have the sums per 32.
    """
    quads = -(-columns // 128)
    return quads * sequences * (528 if types[0] in UNQUANTIZED else 320 if sequences >= 4 else 304)


def max_batch(arch: int) -> int:
    """Most sequences of any launch: as many as shared memory has room for, a slab of each."""
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


def candidates(types: Sequence[GGMLType], batch: int, arch: int, split: int = 8) -> Iterator[Tuning]:
    """Blocks whose shared memory holds one slab of input, the largest first."""
    nb, groups = sequence_groups(batch)
    slot = max(LAYOUTS[type].chunk_bytes for type in types)
    limit = shared_limit(arch) - 2048 - grid_bytes(types)
    wide = slot > 3500
    for warps, depth in ((16, 2), (8, 3), (8, 2), (8, 1), (4, 2), (4, 1), (2, 1)):
        if wide and warps == 16:
            continue
        tuning = Tuning(warps, min(warps, split), depth)
        if _fixed_bytes(tuning, slot, nb * groups) + input_bytes(types, SLAB, nb * groups) <= limit:
            yield tuning


def fit(
    types: Sequence[GGMLType], tuning: Tuning, tiles: int, columns: int, batch: int, card: tuple[int, int]
) -> Block | None:
    """The block of a tuning, with all inputs in shared memory where they fit; None where not even a slab does."""
    arch, multiprocessors = card
    nb, groups = sequence_groups(batch)
    sequences, teams = nb * groups, tuning.warps // tuning.split
    slot = max(LAYOUTS[type].chunk_bytes for type in types)
    limit = shared_limit(arch) - 1024 - grid_bytes(types)
    fixed, sums = _fixed_bytes(tuning, slot, sequences), teams * sequences * 64  # of one tile of each team
    whole = fixed + input_bytes(types, columns, sequences) + sums
    if whole <= limit:
        return Block(tuning, True, whole)
    kept = -(-tiles // (min(multiprocessors, tiles) * teams)) * sums
    slab = fixed + input_bytes(types, SLAB, sequences) + kept
    return Block(tuning, False, slab) if slab <= limit else None


def _largest_block(
    types: Sequence[GGMLType], tiles: int, columns: int, batch: int, card: tuple[int, int], split: int
) -> Block | None:
    blocks = (fit(types, tuning, tiles, columns, batch, card) for tuning in candidates(types, batch, card[0], split))
    return next((block for block in blocks if block is not None), None)


def most_sequences(types: Sequence[GGMLType], tiles: int, columns: int, card: tuple[int, int]) -> int:
    """Most sequences of one launch of a product: fewer than max_batch() where a block has too many sums to keep.

    Raises:
        DeviceError: the card's shared memory is too small even for one.
    """
    split = choose_split(tiles, columns, card[1])
    for batch in (8, 4, 2, 1):
        if batch <= max_batch(card[0]) and _largest_block(types, tiles, columns, batch, card, split) is not None:
            return batch
    names, capability = ", ".join(type.name for type in types), f"{card[0] // 10}.{card[0] % 10}"
    raise DeviceError(
        f"a product of {16 * tiles} rows and {columns} columns ({names}) does not fit the shared memory of this GPU "
        f"(compute capability {capability}, {card[1]} multiprocessors): use device='cpu' or a larger GPU"
    )


def choose_block(types: Sequence[GGMLType], tiles: int, columns: int, batch: int, card: tuple[int, int]) -> Block:
    """The largest block that fits the card (compute capability, multiprocessors) with `batch` sequences.

    The most sequences of a launch decide the order of sums, so that every batch has the same.
    """
    most = most_sequences(types, tiles, columns, card)
    assert batch <= most, f"{batch} sequences, room for {most}"
    of_most = _largest_block(types, tiles, columns, most, card, choose_split(tiles, columns, card[1]))
    assert of_most is not None
    block = _largest_block(types, tiles, columns, batch, card, of_most.tuning.split)
    assert block is not None and block.tuning.split == of_most.tuning.split
    return block


def build_job(
    types: Sequence[GGMLType],
    batch: int,
    arch: int,
    tuning: Tuning | None = None,
    *,
    columns: int = SLAB,
    resident: bool = True,
    paired: bool = False,
    activation: KernelActivation = KernelActivation.NONE,
    operand: bool = False,
) -> Job:
    """The (files, defines) pair of the kernel for matrices of these types and a batch size, for compiler.prebuild.

    Kernels differ by columns <= SLAB or not, and by whether all inputs stay in shared memory; see fit(). operand: its
    input is one, of four sequences.
    """
    tuning = tuning or next(candidates(types, batch, arch))
    nb, groups = sequence_groups(batch)
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
    if operand:
        defines["OPERAND"] = 1
    if grid_bytes(types):
        defines["SHARED_GRIDS"] = 1
    for i, type in enumerate(distinct):
        defines[f"FORMAT{i}"] = type.name
    return _FILES, defines


def operand_block(
    types: Sequence[GGMLType], tiles: int, columns: int, batch: int, card: tuple[int, int]
) -> Block | None:
    """The block of a product whose input another kernel converts (matvec_operand.cu); None where each block does it.

    H200, all products of an 8B Q4_K_M step with 4 sequences, milliseconds: 1.87 without, 1.61 with an operand for the
    one that has more columns than a slab.
    """
    if card[0] != _OPERAND_ARCH or types[0] in UNQUANTIZED or not (3 if columns <= SLAB else 2) <= batch <= 4:
        return None
    if most_sequences(types, tiles, columns, card) < _OPERAND_SEQUENCES:
        return None
    split = choose_block(types, tiles, columns, batch, card).tuning.split
    for tuning in candidates(types, _OPERAND_SEQUENCES, card[0], split):
        # A slab is copied while the one before is multiplied.
        kept = 1 if columns <= SLAB else -(-tiles // (min(card[1], tiles) * (tuning.warps // tuning.split)))
        slot = max(LAYOUTS[type].chunk_bytes for type in types)
        bytes_needed = (
            _fixed_bytes(tuning, slot, _OPERAND_SEQUENCES)
            + tuning.split * 16
            + input_bytes(types, columns if columns <= SLAB else 2 * SLAB, _OPERAND_SEQUENCES)
            + kept * (tuning.warps // tuning.split) * _OPERAND_SEQUENCES * 64
        )
        if tuning.split == split and bytes_needed <= shared_limit(card[0]) - 1024 - grid_bytes(types):
            return Block(tuning, columns <= SLAB, bytes_needed)
    return None


def operand_job() -> Job:
    """The build job of matvec_operand.cu."""
    return _OPERAND_FILES, {}


def operand_bytes(columns: int) -> int:
    """Most bytes of an operand of K columns: bytes and floats of four sequences, and their sums of squares."""
    return -(-columns // 128) * 1280 + 8 * 64


def kernel_job(
    types: Sequence[GGMLType],
    tiles: int,
    columns: int,
    batch: int,
    card: tuple[int, int],
    *,
    tuning: Tuning | None = None,
    paired: bool = False,
    activation: KernelActivation = KernelActivation.NONE,
    operand: Block | None = None,
) -> tuple[Job, Block]:
    """The build job and the block a MatVec of these matrices takes on a card (compute capability, multiprocessors).

    operand: the block of operand_block(), where the input is converted.
    """
    batch = min(batch, most_sequences(types, tiles, columns, card))
    if operand is not None:
        batch, block = _OPERAND_SEQUENCES, operand
    elif tuning is None:
        block = choose_block(types, tiles, columns, batch, card)
    else:
        forced = fit(types, tuning, tiles, columns, batch, card)
        assert forced is not None, f"{tuning} exceeds the shared memory"
        block = forced
    job = build_job(
        types,
        batch,
        card[0],
        block.tuning,
        columns=columns,
        resident=block.resident,
        paired=paired,
        activation=activation,
        operand=operand is not None,
    )
    return job, block


def turns(n: int, most: int) -> list[int]:
    """Sequences of each launch of a product of n; see most_sequences()."""
    return [min(most, n - first) for first in range(0, n, most)]


def runs(types: Sequence[GGMLType]) -> list[int]:
    """How many neighbouring matrices each launch takes.

    Quantized and unquantized matrices read their input in different forms, so each run of one kind has its own launch.
    """
    return [len(list(run)) for _, run in groupby(types, lambda type: type in UNQUANTIZED)]
