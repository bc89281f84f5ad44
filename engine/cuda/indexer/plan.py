"""What the kernels of an indexer are built for, how they are laid over a card, and their scratch memory. Needs no GPU.

Letters: I heads of the indexer, Di their width, C choices of a row: one for all heads, or one for each cache head.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod

from engine.config import PAGE, KvType
from engine.cuda.attention.attention_plan import COMMON_FILES, Job
from engine.cuda.attention.attention_shape import AttentionShape
from engine.model.config import IndexerConfig, IndexerKind, RopeStyle

MOST_SHARED = 12000
"""Most of IndexerShape.shared_floats: the queries of a row are in the shared memory of a block."""

FEWEST_SCORED = 128
"""Rows of prompts whose scores are computed together, at least; decode steps have room for all of theirs."""

FEW_ROWS = 4
"""Up to so many rows the chosen positions of a row are dealt to several blocks."""

_CHOSEN_FILES = (*COMMON_FILES, "attention_chosen.cuh")

_LEAST_RANGE = 128
"""Positions of a range, at least, where there are several."""


class Pool(Enum):
    """How the key of a full block is made of those of its positions; see engine.model.config.IndexerKind."""

    NONE = 0  # it is not
    MEAN = 1  # normalized and rotated
    GATES = 2  # weighted by gates, which are cached beside the keys
    KEPT = 3  # it is cached already


@dataclass(frozen=True)
class IndexerShape:
    """The indexer of a layer; layers that share a choice have equal shapes.

    Attributes:
        heads: I. width: Di.
        top: blocks that are chosen. block: positions of a block.
        local: newest blocks that are always chosen.
        by_head: each head of the indexer scores blocks by their best position and chooses for one cache head; else all
            together score single positions, each head with a weight of the row, for all cache heads.
        all_chosen: with so many positions, or fewer, all of them are chosen.
        kv_type: number format of its keys.
        pool: blocks have keys of their own, full ones alone are chosen, and the positions behind the last are read.
        rope_first, rope_dim, rope_halves: which numbers of a mean are rotated, and as pairs (i, i + rope_dim / 2) or of
            neighbours.
    """

    heads: int
    width: int
    top: int
    block: int
    local: int
    by_head: bool
    all_chosen: int
    kv_type: KvType
    pool: Pool = Pool.NONE
    rope_first: int = 0
    rope_dim: int = 0
    rope_halves: bool = False

    @property
    def cached_width(self) -> int:
        """Numbers that are cached of a position."""
        return 2 * self.width if self.pool is Pool.GATES else self.width

    @property
    def tail(self) -> int:
        """Blocks that are read behind those that are chosen."""
        return 0 if self.pool is Pool.NONE else 1

    @property
    def shared_floats(self) -> int:
        """Shared memory of a block that scores."""
        if self.pool is Pool.NONE:
            return self.heads * (self.width + 1) + 256
        return self.heads * (self.width + 2) + 8 * self.width

    @property
    def choices(self) -> int:
        """C."""
        return self.heads if self.by_head else 1

    @property
    def weight_factor(self) -> float:
        """What the heads' weights are multiplied by."""
        return float((self.heads * self.width) ** -0.5)

    def count(self, context_length: int) -> int:
        """Blocks that a row reads, where a sequence has at most so many positions."""
        return min(self.top, -(-context_length // self.block)) + self.tail

    def append_job(self) -> Job:
        """Builds index_append."""
        return ("cache_numbers.cuh", "index_append.cu"), self._cache_defines()

    def scores_job(self, *, plain: bool = False) -> Job:
        """Builds index_scores. plain: in float32 also where tensor cores could multiply."""
        sizes = {"INDEX_HEADS": self.heads, "BLOCK": self.block, "BY_HEAD": int(self.by_head)}
        if self.pool is not Pool.NONE:
            sizes |= {"INDEX_WIDTH": self.width, "CACHED": self.cached_width, "GATES": int(self.pool is Pool.GATES)}
            sizes |= {"ROPE_FIRST": self.rope_first, "ROPE_DIM": self.rope_dim, "ROPE_HALVES": int(self.rope_halves)}
            if self.pool is Pool.KEPT:
                sizes["KEPT"] = -(-PAGE // self.block)
            return ("cache_numbers.cuh", "turned.cuh", "index_scores_pools.cu"), self._cache_defines() | sizes
        fits = self.heads <= 64 and self.width <= 128 and self.width % 16 == 0 and PAGE == 64
        tensor_cores = fits and self.kv_type is KvType.F16 and not (self.by_head or plain)
        variant = "half" if tensor_cores else "plain"
        return ("cache_numbers.cuh", f"index_scores_{variant}.cu"), self._cache_defines() | sizes

    def choose_job(self) -> Job:
        """Builds index_choose."""
        return ("index_choose.cu",), {"CHOICES": self.choices, "BLOCK": self.block, "TAIL": self.tail}

    def attention_job(self, attention: AttentionShape, tile: HeadTile) -> Job:
        """Builds attention_chosen."""
        return chosen_jobs(attention, tile, self._places)[0]

    def merge_job(self, attention: AttentionShape, tile: HeadTile) -> Job:
        """Builds merge_chosen."""
        return chosen_jobs(attention, tile, self._places)[1]

    @property
    def _places(self) -> dict[str, object]:
        return {"CHOICES": self.choices, "BLOCK": self.block}

    def _cache_defines(self) -> dict[str, object]:
        return {"CACHE_HALF": int(self.kv_type is KvType.F16), "PAGE": PAGE, "INDEX_WIDTH": self.cached_width}


def chosen_jobs(attention: AttentionShape, tile: HeadTile, places: dict[str, object]) -> tuple[Job, Job]:
    """What builds attention_chosen and merge_chosen; places: how a row's list names positions, as defines."""
    defines = attention.defines() | {"HEAD_TILE": tile.heads} | places
    variant = "half" if tile.tensor_cores else "plain"
    attend = (*_CHOSEN_FILES, f"attention_chosen_{variant}.cu"), defines
    return attend, ((*_CHOSEN_FILES, "merge_chosen.cu"), defines)


_POOLS = {IndexerKind.POOLED: Pool.MEAN, IndexerKind.GATED_POOLS: Pool.GATES}


def indexer_shape(config: IndexerConfig, kv_type: KvType) -> IndexerShape:
    """The kernel shape of one layer's indexer."""
    pool, rope = _POOLS.get(config.kind, Pool.NONE), config.rope
    turned = rope.n_rot if rope is not None and pool is Pool.MEAN else 0
    return IndexerShape(
        pool=pool,
        rope_first=config.width - turned if config.rotated_last and turned else 0,
        rope_dim=turned,
        rope_halves=bool(turned) and rope is not None and rope.style is RopeStyle.NEOX,
        heads=config.heads,
        width=config.width,
        top=config.top_k if pool is Pool.NONE else config.top_k // config.block,
        block=config.block,
        local=config.local,
        by_head=config.kind is IndexerKind.BLOCKS,
        all_chosen=config.all_chosen,
        kv_type=kv_type,
    )


@dataclass(frozen=True)
class HeadTile:
    """What a block of attention_chosen does.

    Attributes:
        heads: query heads of one cache head that it serves.
        shared_bytes: dynamic shared memory. tensor_cores: whether it multiplies there; else in float32.
        columns: blocks side by side for one row.
    """

    heads: int
    shared_bytes: int
    tensor_cores: bool
    columns: int


def head_tile(attention: AttentionShape, *, plain: bool = False) -> HeadTile:
    """The tile of a shape. plain: in float32 also where tensor cores could multiply."""
    key, value, group = attention.key_dim, attention.value_dim, attention.heads // attention.kv_heads
    if attention.kv_type is KvType.F16 and key % 16 == value % 16 == 0 and not plain:
        n, rows = 16, key + 8 + (0 if attention.values_in_keys else value + 8)
        shared = 2 * 32 * rows + 2 * 2 * n * 40 + 4 * 8 * n * 33 + 2 * 4 * 32 + 3 * 4 * n  # struct Chosen
        return HeadTile(n, shared, True, attention.kv_heads * -(-group // n))
    n = min(group, 8 if value <= 256 else 4)
    return HeadTile(n, 0, False, attention.kv_heads * -(-group // n))


@dataclass(frozen=True)
class Ranges:
    """How the chosen positions of a row are cut: into n ranges of `length` positions. It depends on no batch."""

    n: int
    length: int


def ranges_of(
    shape: IndexerShape, attention: AttentionShape, tile: HeadTile, context_length: int, multiprocessors: int
) -> Ranges:
    """The ranges of what an indexer chooses."""
    return cut(shape.count(context_length) * shape.block, tile, multiprocessors)


def cut(positions: int, tile: HeadTile, multiprocessors: int) -> Ranges:
    """The ranges that give every multiprocessor a block where a step has one row."""
    wanted = max(1, multiprocessors // tile.columns)
    length = max(_LEAST_RANGE, -(-positions // wanted))
    length = -(-length // 32) * 32
    return Ranges(max(1, -(-positions // length)), length)


def scored_rows(decode_rows: int) -> int:
    """Rows whose scores scratch memory holds, in a runner with so many rows of decode steps."""
    return max(decode_rows, FEWEST_SCORED)


Arrays = dict[str, tuple[int, ...]]
"""Shapes of arrays of four bytes a number, by name."""


def choice_arrays(shape: IndexerShape, decode_rows: int, prompt_rows: int, context_length: int) -> Arrays:
    """What scoring and choosing take: float32 scores, int32 chosen, whole and choosing, and identity.

    Where a whole context is chosen anyway, no row ever has scores or a choice.
    """
    rows = max(decode_rows, prompt_rows)
    scored, kept = (scored_rows(decode_rows), rows) if context_length > shape.all_chosen else (1, 1)
    return {
        "scores": (scored, shape.choices, -(-context_length // shape.block)),
        "chosen": (kept, shape.choices, shape.count(context_length)),
        "whole": (rows,),
        "choosing": (rows,),
        "identity": (rows,),
    }


def range_arrays(attention: AttentionShape, ranges: Ranges) -> Arrays:
    """What attention over several ranges takes, float32."""
    parts = (FEW_ROWS, attention.heads, ranges.n)
    return {"partial": (*parts, attention.value_dim), "partial_max_sum": (*parts, 2)}


def n_bytes(arrays: Arrays) -> int:
    """Memory."""
    return sum(4 * prod(shape) for shape in arrays.values())
