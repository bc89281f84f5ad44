"""What the attention kernels are built for: the shape of the heads, and how the work is laid over a card.

Knows no arrays and needs no GPU; attention.py launches what is planned here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from engine.config import PAGE, KvType
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.compiler import shared_limit

MAX_SPLITS = 128
MOST_SLOTS = 2048
"""Ranges of a decode step that scratch memory has room for; with more of them no row is shared between blocks."""
LARGEST_HEAD = 576
ALIGNED = 4
"""Floats: kernels read so many of a row of qkv at once, so gates behind the heads take whole groups."""
_MERGE_HEADS = 4  # MERGE_HEADS of attention_decode.cuh
COMMON_FILES = ("cache_numbers.cuh", "attention_common.cuh")
"""What every attention kernel is joined behind."""
_ROPE_FILES = (*COMMON_FILES, "rope_append.cu")


class KernelRopeStyle(IntEnum):
    """Which elements of a head turn together."""

    ADJACENT = 0  # (2i, 2i+1), the llama layout of GGUF
    HALVES = 1  # (i, i + rope_dim/2), the NeoX layout


@dataclass(frozen=True)
class AttentionShape:
    """What is the same in every layer of a model; part of the kernels' build key.

    Attributes:
        heads: query heads H, a multiple of kv_heads.
        kv_heads: cache heads K.
        key_dim: Hk. value_dim: Hv. Both 1..576; multiples of 16 up to 256 use tensor cores with a float16 cache.
        rope_dim: leading elements of a head that are rotated, even, 0..Hk; the rest passes through.
        rope_style: pairs of the rotation.
        kv_type: number format of the cache.
        alibi: scores lose a slope times the distance; not with tensor cores.
        distances: scores gain a number for each distance up to this one in both directions; 0 = they do not. Not with
            tensor cores, and in prompts alone.
        both_ways: a token sees later ones of its text, too, which is in one batch: there are no decode steps.
        values_in_keys: a value is the first Hv numbers of its key, which has more, and keys alone are cached; not with
            tensor cores.
        gate: floats of a row behind queries, keys and values, which the kernels do not read; a multiple of ALIGNED.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    rope_dim: int
    rope_style: KernelRopeStyle
    kv_type: KvType
    alibi: bool = False
    values_in_keys: bool = False
    gate: int = 0
    distances: int = 0
    both_ways: bool = False

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0, f"{self.heads} heads do not share {self.kv_heads} cache heads"
        assert 0 < self.key_dim <= LARGEST_HEAD, self.key_dim
        assert 0 < self.value_dim <= LARGEST_HEAD, self.value_dim
        assert not self.values_in_keys or self.value_dim < self.key_dim, "kernels mark a key behind its value"
        assert self.gate % ALIGNED == 0, self.gate
        assert self.rope_dim in range(0, self.key_dim + 1, 2), self.rope_dim

    @property
    def row_width(self) -> int:
        """Floats of one row of qkv."""
        return self.heads * self.key_dim + self.kv_heads * (self.key_dim + self.value_dim) + self.gate

    @property
    def cached_width(self) -> int:
        """Numbers that the cache holds of a position and cache head."""
        return self.key_dim if self.values_in_keys else self.key_dim + self.value_dim

    @property
    def cached_bytes(self) -> int:
        """Bytes of a position and cache head, scales included."""
        widths = (self.key_dim,) if self.values_in_keys else (self.key_dim, self.value_dim)
        return sum(map(self.kv_type.row_bytes, widths))

    @property
    def tensor_cores(self) -> bool:
        """Whether the float16 tensor-core kernels serve this shape; the plain float32 kernels serve every shape."""
        fits = all(dim % 16 == 0 and dim <= 256 for dim in (self.key_dim, self.value_dim))
        return self.kv_type is KvType.F16 and fits and not (self.alibi or self.distances or self.values_in_keys)

    @property
    def head_tile(self) -> int:
        """Query heads of one cache head that one decode block serves; a larger group takes several blocks."""
        if self.tensor_cores:
            return 8
        return min(self.heads // self.kv_heads, 8 if self.value_dim <= 256 else 4)

    @property
    def active_heads(self) -> int:
        """Heads of a tile that exist."""
        return min(self.head_tile, self.heads // self.kv_heads)

    @property
    def head_tiles(self) -> int:
        """Decode blocks side by side for one cache head."""
        return -(-(self.heads // self.kv_heads) // self.head_tile)

    def defines(self) -> dict[str, object]:
        """Preprocessor names of the kernels."""
        return {
            "HEADS": self.heads,
            "KV_HEADS": self.kv_heads,
            "KEY_DIM": self.key_dim,
            "VALUE_DIM": self.value_dim,
            "ROPE_DIM": self.rope_dim,
            "ROPE_HALVES": int(self.rope_style is KernelRopeStyle.HALVES),
            "CACHE_HALF": int(self.kv_type is KvType.F16),
            "PAGE": PAGE,
            **({"ALIBI": 1} if self.alibi else {}),
            **({"VALUES_IN_KEYS": 1} if self.values_in_keys else {}),
            **({"GATE": self.gate} if self.gate else {}),
            **({"DISTANCES": self.distances} if self.distances else {}),
            **({"BOTH_WAYS": 1} if self.both_ways else {}),
        }


assert PAGE & (PAGE - 1) == 0, "kernels find a position in its page by masking"
assert PAGE % 32 == 0, "a tile of the plain kernels is 32 positions of one page"


@dataclass(frozen=True)
class LayerAttention:
    """What may differ from layer to layer; passed at launch.

    Attributes:
        scale: factor of q.k, usually Hk ** -0.5.
        inv_freq: float64 (rope_dim/2,), frequency factors and YaRN ramps folded in; None only where rope_dim is 0.
        temperature: queries are multiplied by 1 + temperature * ln(1 + (position + temperature_offset) //
            temperature_length); 0 = off.
        rope_scale: factor of cos and sin (YaRN's attention factor), else 1.
        q_norm: float32 (Hk,) RMS-norm weight over each query head, or None. k_norm: the same for keys.
        norm_eps: epsilon of those norms.
        window: a token sees itself and the window-1 tokens before it; 0 = everything before it; -n = of that, what its
            chunk of n positions holds. Where shape.both_ways, those at most window // 2 away; 0 = the whole text.
        softcap: scores become softcap * tanh(score / softcap); 0 = off.
        sinks: float32 (H,) logit per head that joins the softmax without a value, or None.
        slopes: float32 (H,) what a score loses per position between query and key, or with shape.distances float32
            (H, 2 * distances + 1) what it gains by the distance key - query; None without either.
    """

    scale: float
    inv_freq: DeviceArray | None = None
    rope_scale: float = 1.0
    temperature: float = 0.0
    temperature_length: int = 1
    temperature_offset: int = 0
    q_norm: DeviceArray | None = None
    k_norm: DeviceArray | None = None
    norm_eps: float = 1e-6
    window: int = 0
    softcap: float = 0.0
    sinks: DeviceArray | None = None
    slopes: DeviceArray | None = None


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
    """

    n_splits: int
    few_splits: int
    min_chunk: int
    warps: int
    shared_bytes: int
    blocks: int
    few_rows: int = 4

    def one_range_each(self, n: int, max_sequences: int) -> bool:
        """Whether every range of n sequences has a block of its own, in a runner with so many slots."""
        return n <= self.few_rows and n * self.n_splits <= scratch_slots(self, max_sequences)


def decode_plan(shape: AttentionShape, arch: int, multiprocessors: int, *, warps: int = 0) -> DecodePlan:
    """Chooses the layout of attention_decode; warps can be forced (0 = choose)."""
    min_chunk = 2 * PAGE
    columns = shape.kv_heads * shape.head_tiles
    few_splits = max(1, min(MAX_SPLITS, multiprocessors // columns))
    n_splits = min(MAX_SPLITS, 2 * few_splits)
    active = shape.active_heads

    def dynamic(n_warps: int) -> int:
        merge = max(n_warps * _MERGE_HEADS * (shape.value_dim + 2) * 4, MAX_SPLITS * active * 8)
        key_stride = (shape.key_dim * 2 + 63) // 128 * 128 + 64  # bytes of a row in shared memory, as in the kernel
        value_stride = (shape.value_dim * 2 + 47) // 64 * 64 + 16
        return merge + (n_warps * 16 * (key_stride + value_stride) if shape.tensor_cores else 0)

    def static(n_warps: int) -> int:
        token = (2 * active + 5) * shape.key_dim + 2 * shape.value_dim + 36 * n_warps + 92
        operands = 32 * shape.key_dim if shape.tensor_cores else 128 * n_warps * shape.head_tile
        return 4 * token + operands

    options = (warps,) if warps else (8, 4, 2, 1)
    chosen = next((n for n in options if dynamic(n) + static(n) <= shared_limit(arch) - 1024), options[-1])
    resident = 2 if shape.key_dim + shape.value_dim <= 256 else 1
    blocks = max(1, resident * multiprocessors // columns)
    return DecodePlan(n_splits, few_splits, min_chunk, chosen, dynamic(chosen), blocks)


@dataclass(frozen=True)
class PrefillPlan:
    """Tile of attention_prefill: what one block does.

    Attributes:
        rows: positions of a query tile. columns: cache positions of a step; a power of two.
        threads: of a block. shared_bytes: its dynamic shared memory.
        variant: kernel file, attention_prefill_<variant>.cu.
        all_heads: a block serves all query heads of a cache head; else one head.
    """

    rows: int
    columns: int
    threads: int
    shared_bytes: int
    variant: str
    all_heads: bool = False


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
            if shared <= budget:
                positions = rows // (shape.heads // shape.kv_heads)
                return PrefillPlan(positions, columns, 128 + 2 * rows, shared, "hopper", all_heads=True)
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
        (_prefill_files(prefill), _prefill_defines(shape, prefill)),
    ]
    if shape.both_ways:
        return of_prompts
    return [
        *((_decode_files(shape), _decode_defines(shape, decode) | {"ONE_RANGE": one}) for one in (0, 1)),
        *of_prompts,
    ]


def _decode_files(shape: AttentionShape) -> tuple[str, ...]:
    variant = "half" if shape.tensor_cores else "plain"
    return (*COMMON_FILES, "attention_ranges.cuh", "attention_decode.cuh", f"attention_decode_{variant}.cu")


def _prefill_files(plan: PrefillPlan) -> tuple[str, ...]:
    helpers = ("hopper.cuh",) if plan.variant == "hopper" else ()
    return (*COMMON_FILES, *helpers, f"attention_prefill_{plan.variant}.cu")


def _decode_defines(shape: AttentionShape, plan: DecodePlan) -> dict[str, object]:
    return shape.defines() | {
        "HEAD_TILE": shape.head_tile,
        "DECODE_WARPS": plan.warps,
        "MAX_SPLITS": MAX_SPLITS,
        "N_SPLITS": plan.n_splits,
        "FEW_SPLITS": plan.few_splits,
        "MIN_CHUNK": plan.min_chunk,
    }


def _prefill_defines(shape: AttentionShape, plan: PrefillPlan) -> dict[str, object]:
    whole = plan.columns % PAGE if plan.variant == "hopper" else PAGE % plan.columns
    assert whole == 0, f"tiles of {plan.columns} positions and pages of {PAGE}: one must hold whole ones of the other"
    tile = {"TILE_ROWS": plan.rows, "TILE_COLUMNS": plan.columns}
    return shape.defines() | tile | ({"CONSUMERS": _WARPGROUPS} if plan.variant == "hopper" else {})


def scratch_slots(plan: DecodePlan, max_sequences: int) -> int:
    """Ranges whose partial sums scratch memory holds at once, for each cache head."""
    return min(max_sequences * plan.n_splits, MOST_SLOTS)


def scratch_bytes(shape: AttentionShape, max_sequences: int, arch: int, multiprocessors: int) -> int:
    """Bytes Attention allocates for a model (shared by all layers), for the memory plan."""
    if shape.both_ways:
        return 0
    slots = scratch_slots(decode_plan(shape, arch, multiprocessors), max_sequences)
    columns = shape.kv_heads * shape.head_tiles
    return columns * 4 * (slots * shape.active_heads * (shape.value_dim + 2) + max_sequences)
