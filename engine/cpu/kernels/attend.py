"""Attention through the compiled kernel: checks operands, spreads the (head, query) pairs over the pool."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.cpu.kernels.build import kernel

if TYPE_CHECKING:
    from engine.cpu.threads import ThreadPool

Float32Array = npt.NDArray[np.float32]

TASK_ELEMENTS = 1 << 17
"""Least cached elements read per task: about 20 us of work, as much as waking a thread costs."""

NO_WINDOW = 1 << 62

TYPES = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
_scratch = threading.local()


def can_attend(keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> bool:
    """Whether `attend` takes this cache: float16 or float32, head widths multiples of 16 without gaps."""
    return keys.dtype == values.dtype and all(
        a.dtype in TYPES and a.shape[2] % 16 == 0 and a.strides[2] == a.itemsize for a in (keys, values)
    )


def attend(
    q: Float32Array,
    keys: npt.NDArray[Any],
    values: npt.NDArray[Any],
    *,
    scale: float,
    window: int | None,
    n_past: int,
    pool: ThreadPool,
) -> Float32Array:
    """Causal attention of the newest T queries of one sequence over its cache, float32 sums.

    Args:
        q: (T, H, Hd), at positions n_past .. n_past + T - 1.
        keys: (K, n_past + T, Hd) float16 or float32; only the last axis must be without gaps.
        values: (K, n_past + T, Hv) of the same type.
        scale: factor of the scores.
        window: keys a query sees, itself included; None = all.
        n_past: positions before the first query.
        pool: threads to use.

    Returns:
        (T, H * Hv) float32; a query's row has the same bits whatever other queries are given.
    """
    n_tokens, n_heads, key_width = q.shape
    n_kv_heads, n_keys, value_width = values.shape
    assert can_attend(keys, values), (
        f"no kernel for keys {keys.dtype} {keys.shape}, values {values.dtype} {values.shape}"
    )
    assert keys.shape == (n_kv_heads, n_past + n_tokens, key_width)
    assert n_keys == n_past + n_tokens
    assert n_heads % n_kv_heads == 0
    q = np.ascontiguousarray(q, dtype=np.float32)
    out = np.empty((n_tokens, n_heads * value_width), dtype=np.float32)
    compute = kernel("attend", TYPES[keys.dtype])
    group = n_heads // n_kv_heads
    table = np.array(operands(q, keys, values, out, scale=scale, window=window, n_past=n_past), dtype=np.int64)
    start = _address(table)
    n_items = n_kv_heads * n_tokens
    work = n_heads * n_tokens * min(n_keys, NO_WINDOW if window is None else window) * (key_width + value_width)
    n_tasks = max(1, min(n_items, 8 * pool.threads, work // TASK_ELEMENTS) if pool.threads > 1 else 1)

    def task(index: int) -> None:
        assert table.size  # the closure keeps the operands alive
        scores = _scores(group * score_floats(n_keys))
        compute(start, n_items * index // n_tasks, n_items * (index + 1) // n_tasks, scores)

    pool.run(task, n_tasks)
    return out


def operands(
    q: Float32Array,
    keys: npt.NDArray[Any],
    values: npt.NDArray[Any],
    out: Float32Array,
    *,
    scale: float,
    window: int | None,
    n_past: int,
) -> tuple[int, ...]:
    """The numbers that the kernel reads (attention.py); keys and values may be longer than the queries see."""
    n_tokens, n_heads, key_width = q.shape
    arrays = tuple(map(_address, (q, keys, values, out)))
    pages = (_address(ONE_PAGE), WHOLE, 0, *keys.strides[:2], 0, *values.strides[:2])
    group, seen = n_heads // keys.shape[0], NO_WINDOW if window is None else window
    (scale_bits,) = struct.unpack("q", struct.pack("d", scale))
    return (*arrays, *pages, scale_bits, n_tokens, n_heads, group, key_width, values.shape[2], n_past, seen)


N_PAST = 18
"""Place of n_past among the operands."""

ONE_PAGE = np.zeros(1, dtype=np.int32)
WHOLE = 1 << 40
"""A sequence in one piece is a single page, number 0, that never ends."""


def score_floats(n_keys: int) -> int:
    """Floats of scratch per query head."""
    return (n_keys + 31) // 16 * 16


def _scores(n_floats: int) -> int:
    """Address of this thread's scratch, grown by doubling."""
    held: Float32Array | None = getattr(_scratch, "scores", None)
    if held is None or held.size < n_floats:
        held = _scratch.scores = np.empty(max(n_floats, 4096, 0 if held is None else 2 * held.size), dtype=np.float32)
    return _address(held)


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
