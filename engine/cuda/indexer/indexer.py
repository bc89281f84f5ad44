"""Launchers of the kernels of an indexer: its cache, its scores and choice, and attention over what is chosen.

Letters: T rows of a step, decode or prompt, I heads of the indexer, Di their width, C choices of a row, P page slots of
one sequence, H query heads, Hv width of a value. All rows go the same way whatever the step: a row's bits depend on its
position and its sequence alone. Every launch may be captured: which rows choose is found on the device. Arrays are
C-contiguous if not said otherwise; those of the cache are described in attention/attention.py. Must not know of layers,
batches or weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine.cuda.attention.attention_plan import Job
from engine.cuda.attention.attention_shape import AttentionShape, LayerAttention
from engine.cuda.driver.arrays import Argument, DeviceArray
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.indexer.plan import FEW_ROWS, Arrays, HeadTile, IndexerShape, Pool, Ranges

_SCORE_BLOCKS = 512
"""Blocks of a launch of scores, over all rows: about four for every multiprocessor of the largest cards."""

_NUMBERS = {"chosen": np.int32, "whole": np.int32, "choosing": np.int32}
"""Types of arrays that are not float32."""


def allocate(arrays: Arrays) -> dict[str, DeviceArray]:
    """The arrays of plan.choice_arrays() or plan.range_arrays() on the current device, zeroed."""
    import cupy

    found = {name: cupy.zeros(shape, _NUMBERS.get(name, np.float32)) for name, shape in arrays.items()}
    if "identity" in found:
        found["identity"] = cupy.asarray(np.arange(arrays["identity"][0], dtype=np.int32))
    return found


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a step, T, as the kernels find their sequences.

    Attributes:
        positions: int32 (T,), -1 for a padded row.
        block_table: int32 (sequences, P), pages; -1: no page.
        sequence: int32 (T,), row of block_table of each row.
    """

    positions: DeviceArray
    block_table: DeviceArray
    sequence: DeviceArray

    @property
    def count(self) -> int:
        """T."""
        return int(self.positions.size)

    @property
    def table(self) -> tuple[DeviceArray, int, DeviceArray]:
        """The table, its pages of a sequence, and the sequences."""
        return self.block_table, int(self.block_table.shape[-1]), self.sequence

    def part(self, first: int, end: int) -> Rows:
        """Rows first .. end - 1."""
        return Rows(self.positions[first:end], self.block_table, self.sequence[first:end])


@dataclass(frozen=True, eq=False)
class PoolArrays:
    """What makes the key of a block; see index_scores_pools.cu.

    Attributes:
        ape: float32 (block, Di), added to gates; else None.
        weight, epsilon: of the norm of a mean; float32 (Di,), else None.
        inv_freq, rope_scale: of its rotation; float64 (rope_dim / 2,), or None.
    """

    ape: DeviceArray | None
    weight: DeviceArray | None
    epsilon: float
    inv_freq: DeviceArray | None
    rope_scale: float

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The last arguments of index_scores."""
        return self.ape, self.weight, float(self.epsilon), self.inv_freq, float(self.rope_scale)


@dataclass(frozen=True, eq=False)
class Scored:
    """What an indexer compares with its keys.

    Attributes:
        q: float32 (T, I * Di), rows contiguous.
        weights: float32 (T, I), rows contiguous; None where each head chooses, or counts alike.
        pool: of a layer whose blocks have keys of their own, else None.
    """

    q: DeviceArray
    weights: DeviceArray | None
    pool: PoolArrays | None = None

    def part(self, first: int, end: int) -> Scored:
        """Rows first .. end - 1."""
        return Scored(self.q[first:end], None if self.weights is None else self.weights[first:end], self.pool)


class Choice:
    """Scores and choices of the layers with one kind of indexer; a layer without one of its own finds the last here.

    Args:
        shape: the indexer.
        memory: the arrays of plan.choice_arrays().
        at_once: rows that are scored together, see plan.scored_rows().
        plain: scores in float32 also where tensor cores could multiply.

    Attributes:
        whole: int32 (rows,): position of rows that attend to all positions up to their own, else -1.
        choosing: int32 (rows,): position of the other rows, else -1.
        chosen: int32 (rows, C, blocks): ascending blocks of each row that chooses.
        identity: int32 (rows,): 0, 1, 2, and so on.
    """

    def __init__(
        self, shape: IndexerShape, memory: Mapping[str, DeviceArray], at_once: int, *, plain: bool = False
    ) -> None:
        self.shape, self._at_once = shape, at_once
        jobs = shape.scores_job(plain=plain), shape.choose_job()
        self._score, self._choose = (
            build(files, defines=defines).get(name)
            for (files, defines), name in zip(jobs, ("index_scores", "index_choose"), strict=True)
        )
        append, defines = shape.append_job()
        self._append = None if shape.pool is Pool.KEPT else build(append, defines=defines).get("index_append")
        self._scores = memory["scores"]
        self.chosen, self.whole, self.choosing = memory["chosen"], memory["whole"], memory["choosing"]
        self.identity = memory["identity"]

    def append(self, keys: DeviceArray, cache: DeviceArray, rows: Rows) -> None:
        """Stores keys, and says which rows choose.

        Args:
            keys: float32 (T, W), rows contiguous, with W numbers of each position that are cached.
            cache: float16 or float32 (N, PAGE, W).
            rows: of the step; a key goes to its row's position, or nowhere where that has no page.
        """
        assert self._append is not None, "keys of blocks are cached by others"
        assert keys.shape[1] == self.shape.cached_width == cache.shape[2] and keys.strides[1] == 4
        args = (keys, keys.strides[0] // 4, cache, *rows.table, rows.positions)
        launch(self._append, rows.count, 128, (*args, self.shape.all_chosen, self.whole, self.choosing))

    def choose(self, scored: Scored, cache: DeviceArray, rows: Rows) -> None:
        """Scores all positions of every row that chooses, and writes its choice.

        Args:
            scored: queries and weights of the rows.
            cache: as append() has left it.
            rows: of the step, in as many launches as scratch memory for scores asks for.
        """
        for first in range(0, rows.count, self._at_once):
            end = min(first + self._at_once, rows.count)
            self.score(scored.part(first, end), cache, rows.part(first, end), first)
            self.choose_scored(end - first, first)

    def score(self, scored: Scored, cache: DeviceArray, rows: Rows, first: int = 0) -> None:
        """The scores of rows that are rows first, first + 1, ... of the step, at most as many as are scored at once."""
        shape, n = self.shape, rows.count
        q, weights = scored.q, scored.weights
        assert n <= self._at_once and q.shape[1] == shape.heads * shape.width and q.strides[1] == 4
        assert (scored.pool is None) == (shape.pool is Pool.NONE)
        assert weights is not None or shape.by_head or shape.pool is Pool.MEAN
        launch(
            self._score,
            (max(1, _SCORE_BLOCKS // n), n),
            256,
            (
                q,
                q.strides[0] // 4,
                weights,
                0 if weights is None else weights.strides[0] // 4,
                float(shape.weight_factor),
                cache,
                *rows.table,
                self.choosing[first : first + n],
                self._scores,
                int(self._scores.shape[2]),
                *(() if scored.pool is None else scored.pool.arguments),
            ),
        )

    def choose_scored(self, n: int, first: int = 0) -> None:
        """The choices of the n rows that were scored last, rows first, first + 1, ... of the step."""
        count, blocks = int(self.chosen.shape[2]) - self.shape.tail, int(self._scores.shape[2])
        chosen = self.chosen[first : first + n] if len(self.chosen) > 1 else self.chosen  # no row chooses
        args = (self._scores, blocks, self.choosing[first : first + n], int(self.shape.local), count, chosen)
        launch(self._choose, (n, self.shape.choices), 1024, args)


class PickedAttention:
    """Attention of rows that read some of their positions, for one shape of heads.

    Args:
        jobs: what builds the kernels, see plan.chosen_jobs().
        attention: the heads.
        tile: what a block does.
        ranges: how the positions of a row are cut.
        memory: the arrays of plan.range_arrays().
    """

    def __init__(
        self,
        jobs: tuple[Job, Job],
        attention: AttentionShape,
        tile: HeadTile,
        ranges: Ranges,
        memory: Mapping[str, DeviceArray],
    ) -> None:
        attend, merge = jobs
        self._attend = build(attend[0], defines=attend[1]).get("attention_chosen")
        self._merge = build(merge[0], defines=merge[1]).get("merge_chosen")
        self._shape, self._tile, self._ranges = attention, tile, ranges
        self._partial, self._partial_max_sum = memory["partial"], memory["partial_max_sum"]

    def attend(
        self,
        layer: LayerAttention,
        qkv: DeviceArray,
        caches: tuple[DeviceArray, DeviceArray],
        rows: Rows,
        picked: tuple[DeviceArray, DeviceArray | None, int],
        out: DeviceArray,
    ) -> None:
        """Rows of out (T, H * Hv) of the rows that are named; others stay as they are.

        Args:
            layer: scale, softcap and sinks are read.
            qkv: float32 (T, row_width) with rotated queries; keys and values are in the cache.
            caches: of keys and of values.
            rows: of the step.
            picked: int32 (T,) the rows' positions, -1: not named; int32 (T, C, count) what they have chosen, or None;
                count.
            out: float32 (T, H * Hv), written.
        """
        shape, n, (positions, chosen, count) = self._shape, rows.count, picked
        assert qkv.shape[-1] == shape.row_width and out.shape[-1] == shape.heads * shape.value_dim
        dealt = n <= FEW_ROWS
        parts = self._ranges.n, self._partial, self._partial_max_sum
        numbers = float(layer.scale), float(layer.softcap), layer.sinks, self._ranges.length, int(dealt)
        args = (qkv, *caches, *rows.table, positions, chosen, count, *numbers, *parts, out)
        grid = n, self._tile.columns * (self._ranges.n if dealt else 1)
        launch(self._attend, grid, 256, args, shared=self._tile.shared_bytes)
        if dealt:
            launch(self._merge, (n, shape.heads), 128, (positions, layer.sinks, *parts, out))


class ChosenAttention(PickedAttention):
    """Attention of rows that choose; arguments as above, but the choice in place of the jobs."""

    def __init__(
        self,
        choice: Choice,
        attention: AttentionShape,
        tile: HeadTile,
        ranges: Ranges,
        memory: Mapping[str, DeviceArray],
    ) -> None:
        jobs = choice.shape.attention_job(attention, tile), choice.shape.merge_job(attention, tile)
        super().__init__(jobs, attention, tile, ranges, memory)
        self._choice = choice

    def __call__(
        self,
        layer: LayerAttention,
        qkv: DeviceArray,
        cache_k: DeviceArray,
        cache_v: DeviceArray,
        rows: Rows,
        out: DeviceArray,
    ) -> None:
        """Rows of out (T, H * Hv) of the rows that choose; others stay as they are.

        Args:
            layer: scale, softcap and sinks are read; there is no window.
            qkv: float32 (T, row_width) with rotated queries; keys and values are in the cache.
            cache_k: see attention/attention.py.
            cache_v: likewise.
            rows: of the step.
            out: float32 (T, H * Hv), written.
        """
        assert layer.window == 0 and layer.slopes is None, "an indexer chooses from all positions"
        choice = self._choice
        picked = choice.choosing[: rows.count], choice.chosen, int(choice.chosen.shape[2])
        self.attend(layer, qkv, (cache_k, cache_v), rows, picked, out)
