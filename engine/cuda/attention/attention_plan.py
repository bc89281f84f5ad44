"""How the work of attention is laid over a card, and the files and defines that its kernels are built of.

Knows no arrays and needs no GPU; attention.py launches what is planned here.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import PAGE
from engine.cuda.attention.attention_shape import AttentionShape
from engine.cuda.driver.compiler import shared_limit

MAX_SPLITS = 128
MOST_SLOTS = 2048
"""Ranges of a decode step that scratch memory has room for; with more of them no row is shared between blocks."""
PART_HEADS = 4
"""See DecodePlan.part_heads: as many as the warps of a block prepare and merge in one round."""
_MERGE_HEADS = 4  # MERGE_HEADS of attention_decode.cuh
COMMON_FILES = ("cache_numbers.cuh", "attention_common.cuh", "cached_rows.cuh")
"""What every attention kernel is joined behind."""
_BYTE_FILES = ("half_pairs.cuh", "bytes_as_halves.cuh")
_OPERAND_COLUMNS = 256  # of an operand of decode_gemm.cu
_PROMPT_COLUMNS = 128  # that an operand of gemm.cu is filled up to
_ROPE_FILES = (*COMMON_FILES, "rope_append.cu")


@dataclass(frozen=True)
class DecodePlan:
    """How attention_decode is laid over the card. It depends on shape and card only, never on the batch.

    All but `blocks` and `few_rows` decide the order of a row's sums.

    Attributes:
        n_splits: most ranges the cached positions of a sequence are cut into.
        few_splits: ranges used until each holds 2 * min_chunk positions: one block on every multiprocessor.
        min_chunk: positions of a range, at least, where there are several; a multiple of PAGE. Up to 2 * min_chunk
            positions are one range: on an H200 a merge costs 1.5 to 2 us, as much as 256 positions.
        warps: warps of a block.
        shared_bytes: dynamic shared memory of a block.
        blocks: most blocks that share the ranges of one cache head (or part of its query heads): all that the card
            holds at once.
        few_rows: up to this many sequences every range has a block of its own, which starts sooner; on an H200 that is
            0.5 to 1 us of 4 to 6 for one sequence, and a loss of 20 % for 16 sequences of 1024.
        leaves_operand: with runs of ranges a block can leave its heads as operands of 256 columns (decode_gemm.py).
        part_heads: query heads of a block while ranges are few, with a block for every range: the blocks of a column
            share its heads. 0: a block has all of them. On an H200, 8 heads over 4 cache heads, us for one sequence of
            128, 1024, 4096 positions: 4.4, 6.8, 9.6 with all, 3.7, 5.7, 9.4 with 4; groups of 4 lose from 256 on.
    """

    n_splits: int
    few_splits: int
    min_chunk: int
    warps: int
    shared_bytes: int
    blocks: int
    few_rows: int = 4
    leaves_operand: bool = False
    part_heads: int = 0

    def parts(self, shape: AttentionShape) -> int:
        """Blocks that share the heads of a column, with a block for every range."""
        return -(-shape.active_heads // self.part_heads) if self.part_heads else 1

    def one_range_each(self, n: int, max_sequences: int) -> bool:
        """Whether every range of n sequences has a block of its own, in a runner with so many slots."""
        return n <= self.few_rows and n * self.n_splits <= scratch_slots(self, max_sequences)


def _tile_row_bytes(shape: AttentionShape) -> int:
    """Bytes of shared memory that a cached position takes in the decode kernel, as in decode_tiles_*.cuh."""
    key, value = shape.key_dim, shape.value_dim
    if shape.bytes_cached:
        return (key + 95) // 128 * 128 + 32 + (value + 47) // 64 * 64 + 16 + (key + value) // 16
    return (key * 2 + 63) // 128 * 128 + 64 + (value * 2 + 47) // 64 * 64 + 16


def decode_plan(shape: AttentionShape, arch: int, multiprocessors: int, *, warps: int = 0) -> DecodePlan:
    """Chooses the layout of attention_decode; warps can be forced (0 = choose)."""
    tile = 32 if shape.bytes_cached else 16  # positions that a warp fetches at once, as in the kernel
    min_chunk = tile * 8 * shape.stretch
    columns = shape.kv_heads * shape.head_tiles
    few_splits = max(1, min(MAX_SPLITS, multiprocessors // columns))
    n_splits = min(MAX_SPLITS, 2 * few_splits)
    active = shape.active_heads
    whole = shape.head_tiles == 1 and active * shape.value_dim % _OPERAND_COLUMNS == 0
    plain = shape.tensor_cores and not shape.bytes_cached and shape.value_dim <= 128
    leaves = arch == 90 and whole and plain

    def dynamic(n_warps: int) -> int:
        merge = max(n_warps * _MERGE_HEADS * (shape.value_dim + 2) * 4, MAX_SPLITS * active * 8)
        return merge + (n_warps * tile * _tile_row_bytes(shape) if shape.tensor_cores else 0)

    def static(n_warps: int) -> int:
        token = (2 * active + 5) * shape.key_dim + 2 * shape.value_dim + 24 * n_warps + 132
        token += active * shape.value_dim if leaves else 0
        operands = 32 * shape.key_dim if shape.tensor_cores else 128 * n_warps * shape.head_tile
        return 4 * token + operands

    options = (warps,) if warps else (8, 4, 2, 1)
    chosen = next((n for n in options if dynamic(n) + static(n) <= shared_limit(arch) - 1024), options[-1])
    resident = 2 if shape.key_dim + shape.value_dim <= 256 else 1
    blocks = max(1, resident * multiprocessors // columns)
    parted = shape.tensor_cores and not shape.bytes_cached and active > PART_HEADS
    parts = PART_HEADS if parted else 0
    sizes = n_splits, few_splits, min_chunk, chosen, dynamic(chosen), blocks
    return DecodePlan(*sizes, leaves_operand=leaves, part_heads=parts)


@dataclass(frozen=True)
class PrefillPlan:
    """Tile of attention_prefill: what one block does.

    Attributes:
        rows: positions of a query tile. columns: cache positions of a step; a power of two.
        threads: of a block. shared_bytes: its dynamic shared memory.
        variant: kernel file, attention_prefill_<variant>.cu.
        all_heads: a block serves all query heads of a cache head; else one head.
        raw_slots: copies of a cache of bytes that are under way before they are converted, in the Hopper kernel.
    """

    rows: int
    columns: int
    threads: int
    shared_bytes: int
    variant: str
    all_heads: bool = False
    raw_slots: int = 0

    def leaves_operand(self, shape: AttentionShape) -> bool:
        """Whether the kernel can leave its result as the operand of a product of gemm.py."""
        return self.variant == "hopper" and shape.heads * shape.value_dim % _PROMPT_COLUMNS == 0


_WARPGROUPS = 2
"""Warpgroups of the Hopper kernel that compute, 64 rows of queries each."""


def prefill_plan(shape: AttentionShape, arch: int, *, hopper: bool = True) -> PrefillPlan:
    """Largest tile that fits the card's shared memory; hopper=False takes the general kernel on Hopper cards too.

    The choice decides the order of a row's sums, so it depends on nothing that changes from call to call.
    """
    if not shape.tensor_cores:
        return PrefillPlan(32, 32, 256, 0, "plain")
    budget = shared_limit(arch) - 1024
    rows = 64 * _WARPGROUPS
    if hopper and arch == 90 and shape.heads // shape.kv_heads <= rows:
        blocks = [-(-dim // 64) for dim in (shape.key_dim, shape.value_dim)]
        for columns in (128, 64):
            if (shape.value_dim + columns) // 2 + columns // 4 > 176:  # registers of the sums, scores and weights
                continue
            shared = 2048 + 128 * (rows * blocks[0] + 2 * columns * sum(blocks))
            slots = 0
            if shape.bytes_cached:
                widest = max(shape.key_dim, shape.value_dim)
                slot = (68 if widest <= 128 else 34) * widest  # RAW_BYTES of prefill_pages_q8.cuh
                slots = max(1, min(6, (budget - shared) // slot))
                shared += slots * slot
            if shared <= budget:
                positions = rows // (shape.heads // shape.kv_heads)
                return PrefillPlan(
                    positions, columns, 128 + 2 * rows, shared, "hopper", all_heads=True, raw_slots=slots
                )
    for rows, columns in ((64, 64), (64, 32), (32, 32), (16, 32), (16, 16)):
        keys_values = 2 * columns * (shape.key_dim + shape.value_dim + 16) * 2
        queries = 2 * rows * (shape.key_dim + 8) * 2 if shape.key_dim > 128 else 0
        if keys_values + queries <= budget and (columns == 32 or shape.key_dim <= 128 or columns == 16):
            return PrefillPlan(rows, columns, rows * 2, keys_values + queries, "half")
    raise AssertionError(f"no prefill tile for heads of {shape.key_dim} on compute capability {arch}")


Job = tuple[tuple[str, ...], dict[str, object]]


def build_jobs(shape: AttentionShape, arch: int, multiprocessors: int) -> list[Job]:
    """The (files, defines) pairs this shape needs, for compiler.prebuild; compiling them needs no GPU."""
    return jobs_of_plans(shape, decode_plan(shape, arch, multiprocessors), prefill_plan(shape, arch))


def jobs_of_plans(shape: AttentionShape, decode: DecodePlan, prefill: PrefillPlan) -> list[Job]:
    """Build jobs of attention_decode (runs of ranges, one range), rope_append and attention_prefill, in this order.

    The first two are left out where there are no decode steps.
    """
    of_prompts: list[Job] = [
        (_ROPE_FILES, shape.defines()),
        (_prefill_files(shape, prefill), _prefill_defines(shape, prefill)),
    ]
    if shape.both_ways:
        return of_prompts
    return [
        _decode_job(shape, decode, one_range=False),
        _decode_job(shape, decode, one_range=True),
        *of_prompts,
    ]


def _decode_job(shape: AttentionShape, plan: DecodePlan, *, one_range: bool) -> Job:
    leaves = plan.leaves_operand and not one_range
    parts = plan.parts(shape) if one_range else 1
    defines = _decode_defines(shape, plan) | {"ONE_RANGE": int(one_range), "HEAD_PARTS": parts}
    defines |= {"LEAVES_OPERAND": 1} if leaves else {}
    files = (*COMMON_FILES, "attention_ranges.cuh", *(("decode_gemm_convert.cuh",) if leaves else ()))
    files = (*files, "attention_decode.cuh")
    if not shape.tensor_cores:
        return (*files, "attention_decode_plain.cu"), defines
    tiles = (*_BYTE_FILES, "decode_tiles_q8.cuh") if shape.bytes_cached else ("decode_tiles_half.cuh",)
    return (*files, *tiles, "attention_decode_half.cu"), defines


def _prefill_files(shape: AttentionShape, plan: PrefillPlan) -> tuple[str, ...]:
    helpers = _BYTE_FILES if shape.bytes_cached and plan.variant != "plain" else ()
    if plan.variant == "hopper":
        pages = "prefill_pages_q8.cuh" if shape.bytes_cached else "prefill_pages_half.cuh"
        helpers = ("hopper.cuh", *helpers, "prefill_stages.cuh", pages)
    return (*COMMON_FILES, *helpers, f"attention_prefill_{plan.variant}.cu")


def _decode_defines(shape: AttentionShape, plan: DecodePlan) -> dict[str, object]:
    return shape.defines() | {
        "HEAD_TILE": shape.head_tile,
        "DECODE_WARPS": plan.warps,
        "MAX_SPLITS": MAX_SPLITS,
        "N_SPLITS": plan.n_splits,
        "FEW_SPLITS": plan.few_splits,
        "MIN_CHUNK": plan.min_chunk,
        "PART_HEADS": plan.part_heads or shape.head_tile,
        "PARTED_RANGES": plan.few_splits // plan.parts(shape),
    }


def _prefill_defines(shape: AttentionShape, plan: PrefillPlan) -> dict[str, object]:
    whole = plan.columns % PAGE if plan.variant == "hopper" else PAGE % plan.columns
    assert whole == 0, f"tiles of {plan.columns} positions and pages of {PAGE}: one must hold whole ones of the other"
    tile = {"TILE_ROWS": plan.rows, "TILE_COLUMNS": plan.columns}
    if plan.variant == "hopper":
        tile |= {"CONSUMERS": _WARPGROUPS} | ({"RAW_SLOTS": plan.raw_slots} if plan.raw_slots else {})
    return shape.defines() | tile


def scratch_slots(plan: DecodePlan, max_sequences: int) -> int:
    """Ranges whose partial sums scratch memory holds at once, for each cache head."""
    return min(max_sequences * plan.n_splits, MOST_SLOTS)


def scratch_bytes(shape: AttentionShape, max_sequences: int, arch: int, multiprocessors: int) -> int:
    """Bytes Attention allocates for a model (shared by all layers), for the memory plan."""
    if shape.both_ways:
        return 0
    plan = decode_plan(shape, arch, multiprocessors)
    slots, columns = scratch_slots(plan, max_sequences), shape.kv_heads * shape.head_tiles
    counters = max_sequences * plan.parts(shape)
    return columns * 4 * (slots * shape.active_heads * (shape.value_dim + 2) + counters)
