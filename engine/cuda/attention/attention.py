"""Launchers of the attention kernels: decode, and rope_append + prefill. They are the kernels' contracts.

Letters: B sequences of a decode step, T rows of a prefill batch, H query heads, K cache heads, Hk width of a query or
key head, Hv width of a value head, N pages of the whole cache, P page slots of one sequence, PAGE positions a page.

Every array is a C-contiguous CuPy array. Buffers shared by all calls:
    qkv          float32 (rows, H*Hk + K*Hk + K*Hv): raw projections, bias included; rows are B or T
    cache_k      float16 or float32 (N, K, PAGE, Hk), or uint8 as AttentionShape.cache_array says, one per layer;
                 cache_v the same with Hv, or cache_k itself where shape.values_in_keys
    block_table  int32 (B, P): page of positions PAGE*i .. PAGE*i+PAGE-1 of a sequence; -1: no page, a write is dropped
    positions    int32 (rows,): position of each row's token, -1 for a padded row (nothing read, nothing written)
    out          float32 (rows, H*Hv)
Shapes are in attention_shape.py, layouts in attention_plan.py. This module must not know of tokenizers or requests.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.config import PAGE
from engine.cuda.attention.attention_plan import (
    MAX_SPLITS,
    DecodePlan,
    PrefillPlan,
    build_jobs,
    decode_plan,
    jobs_of_plans,
    prefill_plan,
    scratch_bytes,
    scratch_slots,
)
from engine.cuda.attention.attention_shape import AttentionShape, KernelRopeStyle, LayerAttention
from engine.cuda.driver.arrays import Argument, DeviceArray, Stream
from engine.cuda.driver.compiler import build, device_arch, shared_limit
from engine.cuda.driver.launch import launch
from engine.cuda.matrix.decode_gemm_plan import groups_of_eight
from engine.cuda.matrix.gemm import Operand

__all__ = [
    "MAX_SPLITS",
    "PAGE",
    "Attention",
    "AttentionShape",
    "DecodePlan",
    "KernelRopeStyle",
    "LayerAttention",
    "PrefillPlan",
    "build_jobs",
    "decode_plan",
    "prefill_plan",
    "prefill_tiles",
    "scratch_bytes",
    "shared_limit",
]


def prefill_tiles(spans: Iterable[tuple[int, int, int, int]], tile_rows: int) -> np.ndarray:
    """Cuts spans of rows into query tiles for Attention.prefill, longest context first (better balance).

    Args:
        spans: (row, n_rows, sequence, n_past) each: n_rows consecutive tokens of one sequence from position n_past on,
            starting at batch row `row`; sequence is the row of block_table.
        tile_rows: Attention.tile_rows.

    Returns:
        int32 (n_tiles, 4): first row, rows (1..tile_rows), sequence, position of the first row.
    """
    tiles = [
        (row + i, min(tile_rows, n_rows - i), sequence, n_past + i)
        for row, n_rows, sequence, n_past in spans
        for i in range(0, n_rows, tile_rows)
    ]
    if len(tiles) > 1:
        tiles.sort(key=lambda tile: (-tile[3], tile[0]))
    return np.array(tiles, dtype=np.int32).reshape(len(tiles), 4)


class Attention:
    """The attention kernels of one model on the current device, with their scratch memory.

    Args:
        shape: the model's heads.
        max_sequences: most sequences of one decode step (sizes the scratch memory).
        plan: layout of the decode kernel; chosen for the card when left out.
        prefill: layout of the prefill kernel, likewise.
    """

    def __init__(
        self,
        shape: AttentionShape,
        max_sequences: int,
        *,
        plan: DecodePlan | None = None,
        prefill: PrefillPlan | None = None,
    ) -> None:
        import cupy

        arch = device_arch()
        multiprocessors = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        self.shape = shape
        self.max_sequences = max_sequences
        self.plan = plan or decode_plan(shape, arch, multiprocessors)
        self._prefill_plan = prefill or prefill_plan(shape, arch)
        jobs = jobs_of_plans(shape, self.plan, self._prefill_plan)
        names = ("attention_decode", "attention_decode", "rope_append", "attention_prefill")[-len(jobs) :]
        kernels = [build(files, defines=defines).get(name) for (files, defines), name in zip(jobs, names, strict=True)]
        *self._decode, self._rope, self._prefill = kernels
        if shape.both_ways:
            return
        columns = shape.kv_heads * shape.head_tiles
        self._slots = scratch_slots(self.plan, max_sequences)
        parts = columns * self._slots * shape.active_heads
        self._partial = cupy.empty((parts, shape.value_dim), cupy.float32)
        self._partial_max_sum = cupy.empty((parts, 2), cupy.float32)
        counters = max_sequences * columns * self.plan.parts(shape)
        self._counters = cupy.zeros(counters, cupy.int32)  # the kernel leaves them at zero
        if shared_limit(arch) > 64 * 1024:
            # The default limit of 48 KiB includes the kernel's static share, which launch() cannot see.
            for kernel in self._decode:
                kernel.allow_shared(max(self.plan.shared_bytes, 48 * 1024 + 16))

    @property
    def tile_rows(self) -> int:
        """Query rows of one prefill tile, for prefill_tiles."""
        return self._prefill_plan.rows

    def decode(
        self,
        layer: LayerAttention,
        qkv: DeviceArray,
        cache_k: DeviceArray,
        cache_v: DeviceArray,
        block_table: DeviceArray,
        positions: DeviceArray,
        out: DeviceArray,
        *,
        early: bool = True,
        operand: DeviceArray | None = None,
        stream: Stream | None = None,
    ) -> None:
        """One new token for each of B sequences: QK-norm, RoPE, cache append, attention. Row b is sequence b.

        Reads qkv (B, row_width), positions (B,), block_table (B, P); appends the new key and value to the page of
        positions[b]; writes out (B, H*Hv) rows with positions[b] >= 0. B is positions.size, at most max_sequences.
        One grid for every length, so it can be captured; the same bits whatever the other rows are. A slot of -1 in
        block_table is not read, and a new key and value that would go there are dropped; a row behind the table's end
        is a padded row.

        Started early (programmatic dependent launch): positions, block_table and cache rows before positions[b] are
        read before the wait, so the first kernel of a step must call pdl_wait() before pdl_launch(). Not `early` where
        earlier kernels of the step write cache rows that it reads, as rope_append() does for rows of one sequence.

        operand: uint8, where out is left as the operand of a product of decode_gemm.py for B sequences as well; where
        plan.leaves_operand, and more than plan.few_rows sequences.
        """
        shape, n = self.shape, int(positions.size)
        assert n <= self.max_sequences, f"{n} sequences, scratch memory for {self.max_sequences}"
        assert qkv.shape[-1] == shape.row_width, qkv.shape
        assert out.shape[-1] == shape.heads * shape.value_dim, out.shape
        columns = shape.kv_heads * shape.head_tiles
        ranges = n * self.plan.n_splits  # at most
        one_each = self.plan.one_range_each(n, self.max_sequences)
        assert operand is None or (self.plan.leaves_operand and not one_each), "a kernel that leaves no operand"
        launch(
            self._decode[one_each],
            (columns * self.plan.parts(shape), self.plan.n_splits, n)
            if one_each
            else (columns, min(self.plan.blocks, ranges)),
            self.plan.warps * 32,
            (
                qkv,
                cache_k,
                cache_v,
                block_table,
                int(block_table.shape[-1]),
                positions,
                n,
                layer.inv_freq,
                float(layer.rope_scale),
                float(layer.temperature),
                int(layer.temperature_length),
                int(layer.temperature_offset),
                layer.q_norm,
                layer.k_norm,
                float(layer.norm_eps),
                float(layer.scale),
                float(layer.softcap),
                int(layer.window),
                layer.sinks,
                self._slots,
                self._partial,
                self._partial_max_sum,
                self._counters,
                out,
                operand,
                0 if operand is None else groups_of_eight(n),
                *self._slopes(layer),
            ),
            shared=self.plan.shared_bytes,
            stream=stream,
            pdl=early,
        )

    def rope_append(
        self,
        layer: LayerAttention,
        qkv: DeviceArray,
        cache_k: DeviceArray,
        cache_v: DeviceArray,
        block_table: DeviceArray,
        row_sequence: DeviceArray,
        positions: DeviceArray,
        *,
        bias: DeviceArray | None = None,
        queries: bool = True,
        stream: Stream | None = None,
    ) -> None:
        """Bias, QK-norm and RoPE for T rows; queries are rewritten in place, keys and values go to the cache.

        What goes to the cache has the bits that decode() would put there.

        Args:
            layer: constants of the layer.
            qkv: float32 (T, row_width); its query part is overwritten, the rest is only read.
            cache_k: see the module.
            cache_v: likewise.
            block_table: int32 (sequences, P).
            row_sequence: int32 (T,), row of block_table of each row.
            positions: int32 (T,), -1 = skip the row.
            bias: float32 (row_width,) added first, or None where the projection added it.
            queries: rewrite the queries; else they stay as they are, as decode() reads them.
            stream: the current stream when left out.
        """
        assert qkv.shape[-1] == self.shape.row_width
        first = 0 if queries else self.shape.heads
        launch(
            self._rope,
            # 3 heads a warp, one by one
            (int(positions.size), -(-(self.shape.heads + self.shape.kv_heads - first) // 12)),
            128,
            (
                qkv,
                bias,
                cache_k,
                cache_v,
                block_table,
                int(block_table.shape[-1]),
                row_sequence,
                positions,
                layer.inv_freq,
                float(layer.rope_scale),
                float(layer.temperature),
                int(layer.temperature_length),
                int(layer.temperature_offset),
                layer.q_norm,
                layer.k_norm,
                float(layer.norm_eps),
                first,
            ),
            stream=stream,
        )

    def prefill(
        self,
        layer: LayerAttention,
        qkv: DeviceArray,
        cache_k: DeviceArray,
        cache_v: DeviceArray,
        block_table: DeviceArray,
        tiles: DeviceArray,
        out: DeviceArray,
        *,
        lengths: DeviceArray | None = None,
        operand: Operand | None = None,
        stream: Stream | None = None,
    ) -> None:
        """Attention of T rows over the cache, which already holds their keys and values (after rope_append).

        Args:
            layer: constants of the layer.
            qkv: float32 (T, row_width) with rotated queries.
            cache_k: see the module.
            cache_v: likewise.
            block_table: int32 (sequences, P).
            tiles: int32 (n_tiles, 4) on the device, from prefill_tiles; n_tiles 0 does nothing.
            out: float32 (T, H*Hv); rows that no tile names stay as they are.
            lengths: int32 (sequences,), tokens of each text; where shape.both_ways, else None.
            operand: (T, H*Hv), written instead of out; where the plan's leaves_operand.
            stream: the current stream when left out.
        """
        assert out.shape[-1] == self.shape.heads * self.shape.value_dim
        assert (lengths is not None) == self.shape.both_ways
        if len(tiles) == 0:
            return
        plan = self._prefill_plan
        assert operand is None or plan.leaves_operand(self.shape), "a kernel that leaves no operand"
        launch(
            self._prefill,
            (self.shape.kv_heads, len(tiles)) if plan.all_heads else (len(tiles), self.shape.heads),
            plan.threads,
            (
                qkv,
                cache_k,
                cache_v,
                block_table,
                int(block_table.shape[-1]),
                tiles,
                float(layer.scale),
                float(layer.softcap),
                int(layer.window),
                layer.sinks,
                out if operand is None else operand.data,
                0 if operand is None else operand.pitch,
                *self._slopes(layer),
                *((lengths,) if self.shape.both_ways else ()),
            ),
            shared=plan.shared_bytes,
            stream=stream,
        )

    def _slopes(self, layer: LayerAttention) -> tuple[Argument, ...]:
        """The argument of kernels that know biases of distances."""
        biased = self.shape.alibi or self.shape.distances > 0
        assert (layer.slopes is not None) == biased
        return (layer.slopes,) if biased else ()
