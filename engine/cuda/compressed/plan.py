"""What the kernels of attention over a window and compressed blocks are built for, and its memory. Needs no GPU.

Letters: H heads, Hd their width, B positions of a block, I and Di heads of the index and their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from engine.config import PAGE, KvType
from engine.cuda.attention.attention_plan import Job
from engine.cuda.attention.attention_shape import AttentionShape, KernelRopeStyle
from engine.cuda.attention.cache import BlockCacheShape
from engine.cuda.indexer.plan import HeadTile, IndexerShape, Pool, Ranges, chosen_jobs, cut, head_tile
from engine.model.config import AttentionConfig, RopeStyle

_FILES = ("cache_numbers.cuh",)


@dataclass(frozen=True)
class BlockShape:
    """One layer; layers whose kernels are the same have equal shapes.

    Attributes:
        heads: H. head: Hd. window: single positions that a row sees.
        length: B, a divisor or a multiple of PAGE; 0: there are no blocks.
        overlap: keys of blocks are made of the positions of the block before, too.
        index_heads: I. index_width: Di. top: blocks that are chosen. All 0: all blocks are seen.
        rope_dim: last numbers of queries and keys that are rotated. rope_halves: as pairs (i, i + rope_dim / 2).
        kv_type: number format of the cache.
    """

    heads: int
    head: int
    window: int
    length: int
    overlap: bool
    index_heads: int
    index_width: int
    top: int
    rope_dim: int
    rope_halves: bool
    kv_type: KvType

    def __post_init__(self) -> None:
        assert self.length == 0 or PAGE % self.length == 0 or self.length % PAGE == 0, self

    @cached_property
    def attention(self) -> AttentionShape:
        """The heads: one key for all, which is the value too."""
        return AttentionShape(
            heads=self.heads,
            kv_heads=1,
            key_dim=self.head,
            value_dim=self.head,
            rope_dim=0,
            rope_style=KernelRopeStyle.ADJACENT,
            kv_type=self.kv_type,
            values_in_keys=True,
            unmarked=True,
        )

    @cached_property
    def index(self) -> IndexerShape | None:
        """What chooses blocks; None: all are seen."""
        if not self.top:
            return None
        return IndexerShape(
            heads=self.index_heads,
            width=self.index_width,
            top=self.top,
            block=self.length,
            local=0,
            by_head=False,
            all_chosen=(self.top + 1) * self.length - 1,
            kv_type=self.kv_type,
            pool=Pool.KEPT,
        )

    @property
    def gates(self) -> tuple[int, int]:
        """Gates of a position, for the keys of attention and of the index; it has as many values."""
        wide = (1 + self.overlap) if self.length else 0
        return wide * self.head, wide * self.index_width

    @property
    def left(self) -> int:
        """Numbers of a position that keys of blocks are made of."""
        return 2 * sum(self.gates)

    @property
    def block_rows(self) -> int:
        """Most blocks that end in one page."""
        return -(-PAGE // self.length) if self.length else 0

    @property
    def cache(self) -> BlockCacheShape:
        """What the layer caches."""
        return BlockCacheShape(self.head, self.left, self.block_rows, self.index_width, self.kv_type)

    def count(self, context_length: int) -> int:
        """Places of blocks in the list of a row, where a sequence has at most so many positions."""
        if self.index is not None:
            return self.index.count(context_length)
        return -(-context_length // self.length) if self.length else 0

    def read_bytes(self, n_positions: int) -> int:
        """What attention reads of the cache for a row that sees so many positions."""
        blocks = n_positions // self.length if self.length else 0
        scored = blocks * self.index_width if self.top and blocks > self.top else 0
        seen = min(self.window, n_positions) + (min(blocks, self.top) if self.top else blocks)
        return (seen * self.head + scored) * self.kv_type.float_bytes

    def ranges(self, context_length: int, multiprocessors: int) -> Ranges:
        """How what a row sees is cut."""
        return cut(self.window + self.count(context_length), self.tile, multiprocessors)

    @property
    def tile(self) -> HeadTile:
        """What a block of attention_chosen does."""
        return head_tile(self.attention)

    # ---- build jobs ------------------------------------------------------------------------------------------

    def append_job(self) -> Job:
        """Builds block_append."""
        key, index = self.gates
        more = {"LEFT": self.left, "KEY_GATES": key, "INDEX_GATES": index, "TOP": self.top}
        return (*_FILES, "block_append.cu"), self._defines() | more

    def keys_job(self) -> Job:
        """Builds block_keys."""
        more = {"INDEX": self.index_width, "OVERLAP": int(self.overlap), "LEFT": self.left}
        more |= {"ROPE_DIM": self.rope_dim, "ROPE_HALVES": int(self.rope_halves)}
        return (*_FILES, "turned.cuh", "block_keys.cu"), self._defines() | more

    def attention_jobs(self) -> tuple[Job, Job]:
        """Build attention_chosen and merge_chosen."""
        places: dict[str, object] = {"CHOICES": 1, "WINDOW": self.window, "SPAN": self.length, "TOP": self.top}
        return chosen_jobs(self.attention, self.tile, places | {"PAGE_ROWS": PAGE + self.block_rows})

    def _defines(self) -> dict[str, object]:
        sizes = {"PAGE_ROWS": PAGE + self.block_rows, "HEAD": self.head, "SPAN": self.length}
        return {"CACHE_HALF": int(self.kv_type is KvType.F16), "PAGE": PAGE, **sizes}


def block_shape(config: AttentionConfig, kv_type: KvType) -> BlockShape:
    """The kernel shape of one layer."""
    assert config.compressed is not None
    assert config.rope is not None
    assert config.window is not None
    blocks = config.compressed.blocks
    index = None if blocks is None else blocks.index
    return BlockShape(
        heads=config.n_heads,
        head=config.key_width,
        window=config.window,
        length=0 if blocks is None else blocks.length,
        overlap=blocks is not None and blocks.overlap,
        index_heads=0 if index is None else index.heads,
        index_width=0 if index is None else index.width,
        top=0 if index is None else index.top_k,
        rope_dim=config.rope.n_rot,
        rope_halves=config.rope.style is RopeStyle.NEOX,
        kv_type=kv_type,
    )
