"""Attention through the compiled kernel: checks operands, spreads the (head, query) pairs over the pool."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.config import KV_BLOCK, PAGE, KvType
from engine.cpu.caches.rows import CacheRows
from engine.cpu.kernels.attention.item import (
    HEAD_FLOATS as HEAD_FLOATS,
)  # re-exported: callers size their scratch by it
from engine.cpu.kernels.build import kernel
from engine.cpu.memory import aligned_empty

if TYPE_CHECKING:
    from engine.cpu.threads import ThreadPool

Float32Array = npt.NDArray[np.float32]

TASK_ELEMENTS = 1 << 17
"""Least cached elements read per task: about 20 us of work, as much as waking a thread costs."""

NO_WINDOW = 1 << 62

TYPES = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32", np.dtype(np.int8): "Q8_0"}
_scratch = threading.local()


def can_attend(keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> bool:
    """Whether `attend` takes these pages: keys turned, widths multiples of 16.

    Float16 or float32 without gaps, or int8 whose scales are behind each head's page (engine.cpu.caches.attention).
    """
    return keys.dtype == values.dtype and all(
        a.dtype in TYPES and a.shape[3] % 16 == 0 and _is_whole(whole)
        for a, whole in ((keys, turned(keys)), (values, values))
    )


def _is_whole(pages: npt.NDArray[Any]) -> bool:
    """Whether pages in the order of memory have gaps only where scales are."""
    if pages.dtype != np.int8:
        return pages.flags.c_contiguous
    width, columns = pages.shape[2] * pages.shape[3] // PAGE, pages.shape[3]
    if width % KV_BLOCK:
        return False
    head = PAGE * KvType.Q8_0.row_bytes(width)
    return pages.strides == (pages.shape[1] * head, head, columns, 1)


def turned(keys: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Pages of keys (N, K, PAGE, Hd) in the order of memory: (N, K, Hd, PAGE), neighbouring positions side by side."""
    return keys.transpose(0, 1, 3, 2)


def attend(
    q: Float32Array,
    keys: npt.NDArray[Any],
    values: npt.NDArray[Any],
    rows: CacheRows,
    *,
    scale: float,
    window: int | None,
    pool: ThreadPool,
    softcap: float | None = None,
    sinks: Float32Array | None = None,
    slopes: Float32Array | None = None,
    out: Float32Array | None = None,
) -> Float32Array:
    """Causal attention of T queries, each over the pages of its own sequence, float32 sums.

    Args:
        q: (T, H, Hd).
        keys: all pages (N, K, PAGE, Hd) as can_attend() has them.
        values: all pages (N, K, PAGE, Hv) of the same type.
        rows: position and pages of each query; the pages hold all positions up to its own.
        scale: factor of the scores.
        window: keys a query sees, itself included; None = all.
        n_past: positions before the first query.
        pool: threads to use.
        softcap: scores s become softcap * tanh(s / softcap); not together with slopes.
        sinks: (H,) one more score of every head, or None.
        slopes: (H,) subtracted from a score per position between query and key, or None.
        out: where the result goes, without gaps; None makes a new array.

    Returns:
        (T, H * Hv) float32; a query's row has the same bits for any other queries beside it and for any pages.
    """
    n_tokens, n_heads, key_width = q.shape
    _, n_kv_heads, _, value_width = values.shape
    assert can_attend(keys, values), (
        f"no kernel for keys {keys.dtype} {keys.shape}, values {values.dtype} {values.shape}"
    )
    assert keys.shape[1:] == (n_kv_heads, PAGE, key_width)
    assert len(rows.array) == n_tokens
    assert n_heads % n_kv_heads == 0
    q = np.ascontiguousarray(q, dtype=np.float32)
    if out is None:
        out = np.empty((n_tokens, n_heads * value_width), dtype=np.float32)
    assert out.flags.c_contiguous
    compute = kernel("attend", TYPES[keys.dtype])
    settings: dict[str, Any] = {"scale": scale, "window": window}
    settings |= {"softcap": softcap, "sinks": sinks, "slopes": slopes}
    table = np.array(operands(q, keys, values, rows, out, **settings), dtype=np.int64)
    start = _address(table)
    n_items = n_kv_heads * n_tokens
    n_seen = int(np.minimum(rows.array[:, 1] + 1, NO_WINDOW if window is None else window).sum())
    work = n_heads * n_seen * (key_width + value_width)
    n_tasks = max(1, min(n_items, 8 * pool.threads, work // TASK_ELEMENTS) if pool.threads > 1 else 1)

    def task(index: int) -> None:
        assert table.size  # the closure keeps the operands alive
        scratch = _scratch_of(n_heads * HEAD_FLOATS)
        compute(start, n_items * index // n_tasks, n_items * (index + 1) // n_tasks, scratch)

    pool.run(task, n_tasks)
    return out


def operands(
    q: Float32Array,
    keys: npt.NDArray[Any],
    values: npt.NDArray[Any],
    rows: CacheRows,
    out: Float32Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Float32Array | None = None,
    slopes: Float32Array | None = None,
    n_keys: int = 0,
) -> tuple[int, ...]:
    """The numbers that the kernel reads (loop.py); the last two, for activations, are 0.

    With n_keys a query sees the n_keys positions of its text on both sides, in each direction window - 1 of them.
    """
    n_tokens, n_heads, key_width = q.shape
    addresses = tuple(map(_address, (q, keys, values, out, rows.array)))
    seen = NO_WINDOW if window is None else window
    assert softcap is None or slopes is None
    scale_bits, cap_bits = struct.unpack("qq", struct.pack("dd", scale, softcap or 0.0))
    tables = (0 if table is None else _address(table) for table in (sinks, slopes))
    shape = (n_tokens, n_heads, key_width, values.shape[3])
    return (*addresses, keys.shape[1], scale_bits, *shape, int(rows.alone), seen, cap_bits, *tables, n_keys, 0, 0)


N_HEADS = 8
"""Place of H among them."""


def attend_text(
    q: Float32Array,
    keys: npt.NDArray[Any],
    values: npt.NDArray[Any],
    pages: npt.NDArray[np.int64],
    out: Float32Array,
    heads: range,
    settings: dict[str, Any],
) -> None:
    """Attention of a whole text over itself, in both directions, for some heads of keys; on the calling thread.

    Args:
        q: (T, H, Hd), without gaps.
        keys: as attend() takes them.
        values: as attend() takes them.
        pages: of the text, enough for T positions.
        out: (T, H * Hv), without gaps; the columns of the query heads of these heads of keys are written.
        heads: of keys.
        settings: scale, window (keys that a query sees in each direction, itself included), softcap, sinks, slopes.
    """
    n_tokens, n_heads, width = q.shape
    group = n_heads // values.shape[1]
    window, biased = settings["window"], settings["sinks"] is not None or settings["slopes"] is not None
    if biased or (window is not None and window < n_tokens):
        rows = _text_rows(pages, range(n_tokens))
        table = operands(q, keys, values, rows, out, n_keys=n_tokens, **settings)
        _run_items(keys, (table, rows), range(heads.start * n_tokens, heads.stop * n_tokens), group)
        return
    # All queries of a head of keys see the same keys. To the kernel they are query heads of one token, of which it
    # computes several at a time.
    columns = slice(heads.start * group, heads.stop * group)
    queries = np.ascontiguousarray(q[:, columns].transpose(1, 0, 2)).reshape(1, -1, width)
    found = np.empty((1, queries.shape[1] * values.shape[3]), dtype=np.float32)
    rows = _text_rows(pages, range(n_tokens - 1, n_tokens))
    one_token = list(operands(queries, keys, values, rows, found, **settings | {"window": None}))
    # The kernel counts heads from the first one there is, which may lie before the rows at hand.
    one_token[0] -= 4 * columns.start * n_tokens * width
    one_token[3] -= 4 * columns.start * n_tokens * values.shape[3]
    one_token[N_HEADS] = n_heads * n_tokens
    for head in heads:
        _run_items(keys, (one_token, rows), range(head, head + 1), group * n_tokens)
    out.reshape(n_tokens, n_heads, -1)[:, columns] = found.reshape(-1, n_tokens, values.shape[3]).transpose(1, 0, 2)


def _text_rows(pages: npt.NDArray[np.int64], positions: range) -> CacheRows:
    """Positions of the one sequence whose pages these are."""
    array = np.array([(_address(pages), position) for position in positions], dtype=np.int64)
    return CacheRows(array, pages, len(positions) == 1)


def _run_items(keys: npt.NDArray[Any], given: tuple[Sequence[int], CacheRows], items: range, heads: int) -> None:
    """Run the kernel on the calling thread, whose scratch has room for so many heads."""
    held, _rows = np.array(given[0], dtype=np.int64), given[1]  # the addresses of the rows are among the operands
    kernel("attend", TYPES[keys.dtype])(_address(held), items.start, items.stop, _scratch_of(heads * HEAD_FLOATS))


def _scratch_of(n_floats: int) -> int:
    """Address of this thread's scratch, grown by doubling."""
    held: Float32Array | None = getattr(_scratch, "floats", None)
    if held is None or held.size < n_floats:
        held = _scratch.floats = aligned_empty(max(n_floats, 4096, 0 if held is None else 2 * held.size))
    return _address(held)


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
