"""Matrix products straight from packed weights: x @ W.T, the one place where the CPU multiplies.

`reference=True` computes in plain numpy, for comparison. The fast path runs compiled kernels over ranges of weight rows
in the pool. A few rows of x are multiplied by fused dequantize-and-dot kernels; for more, a tile of weight rows is
dequantized into the thread's scratch and multiplied by a blocked kernel.

Batch invariant: on the fast path every product is summed in the same order (kernels/emit.py, LANES), so a row of the
result has the same bits whatever other rows are in the batch, for any number of rows and threads. No BLAS is called
there, so its threads never compete with the pool's. The reference path goes through BLAS, which does not guarantee
this.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from engine.cpu.memory import aligned_empty
from engine.gguf.quants import FORMATS, GGMLType, row_bytes

if TYPE_CHECKING:
    from engine.cpu.threads import ThreadPool
    from engine.model.weights import Weight

Float32Array = npt.NDArray[np.float32]

LANES = 16  # columns per vector of the kernels; tests/cpu/products/test_matmul.py holds it equal to kernels.emit.LANES

REFERENCE_TILE = 1 << 22
"""Floats per dequantized tile of the reference path (16 MB)."""

SCRATCH_BYTES = 256 << 10
"""Dequantized floats per tile of the fast path: half of a common second-level cache."""

ROWS_STEP = 12
"""Row blocks of the blocked kernel; tiles are a multiple of it."""

DOT_TASK_WEIGHTS = 1 << 17
"""Least weights per task of a product of one row: 20 us of work at 6e9 weights/s, as much as waking a thread costs."""

DOT_TOKENS = 8
"""Rows of x up to which weights are decoded in registers, four rows at a time, instead of into scratch."""


@dataclass(frozen=True)
class PreparedWeight:
    """What a product needs of a weight, checked once: kernels read no byte outside it.

    `kernels` says whether the compiled decoder reads these rows; otherwise numpy dequantizes each tile.
    """

    type: GGMLType
    rows: int
    columns: int
    raw: npt.NDArray[np.uint8]
    address: int
    stride: int
    n_blocks: int
    kernels: bool


_prepared: WeakKeyDictionary[Any, PreparedWeight] = WeakKeyDictionary()
_scratch = threading.local()


def matmul(x: npt.ArrayLike, w: Weight, *, pool: ThreadPool, reference: bool = False) -> Float32Array:
    """Computes x @ W.T, W dequantized during the product; float32 throughout.

    Args:
        x: (T, K) activations, any strides; T may be 0.
        w: a weight of shape (N, K) whose raw is uint8 (N, row bytes), possibly a slice of a larger one.
        pool: threads to use.
        reference: plain numpy, one tile of at most 16 MB at a time.

    Returns:
        (T, N) float32, a new array.

    Raises:
        ValueError: shapes do not fit, or the type cannot be dequantized.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    weight = prepare(w)
    if x.ndim != 2 or x.shape[1] != weight.columns:
        raise ValueError(f"{w.name}: x is {x.shape}, must be (tokens, {weight.columns})")
    n_tokens = x.shape[0]
    if reference:
        return _reference(x, weight)
    out = np.empty((n_tokens, weight.rows), dtype=np.float32)
    if 1 <= n_tokens <= DOT_TOKENS and weight.kernels:
        _dot(x, weight, out, pool)
    elif n_tokens:
        _product(x, weight, out, pool)
    return out


def warm_up(
    types: Iterable[GGMLType], status: Callable[[str], None] = lambda _: None, *, kv_type: str | None = None
) -> None:
    """Compiles (or loads from the disk cache) the kernels for matrices of these types.

    Args:
        types: types of the matrices of a model; those without a compiled decoder are skipped.
        status: called before each type, e.g. to show it while the first run compiles.
        kv_type: "f16" or "f32" to prepare what runs between the products as well, for such a cache.
    """
    from engine.cpu.kernels.formats.decoders import DECODERS

    names = [name for name in dict.fromkeys(GGMLType(type).name for type in types) if name in DECODERS]
    for name in names:
        status(f"preparing kernels: {name}")
        for kind in ("dot_rows", "dot_tokens", "dequantize_rows"):
            _kernel(kind, name)
    status("preparing kernels: product")
    _kernel("product_f32")
    if kv_type is not None:
        status("preparing kernels: attention")
        for kind, type_name in (("attend", kv_type.upper()), ("rotate_store", kv_type.upper())):
            _kernel(kind, type_name)
        for kind, type_name in (("normalize", "RMS"), ("gate", "SILU"), ("run_program", "F32")):
            _kernel(kind, type_name)


@cache
def _kernel(kind: str, type_name: str = "F32") -> Callable[..., None]:
    from engine.cpu.kernels.build import kernel  # numba is not imported before it is needed

    return kernel(kind, type_name)


def prepare(w: Weight) -> PreparedWeight:
    """Check a weight's shape and layout, once.

    Raises:
        ValueError: it is not a packed matrix, or its type cannot be dequantized.
    """
    try:
        weight = _prepared.get(w)
    except TypeError:  # not hashable: checked each time, which is slower
        weight = None
    return weight if weight is not None else _prepare(w)


def _prepare(w: Weight) -> PreparedWeight:
    from engine.cpu.kernels.formats.decoders import DECODERS

    if len(w.shape) != 2:
        raise ValueError(f"{w.name}: shape {tuple(w.shape)} is not a matrix; take one expert of a stack")
    if w.type not in FORMATS and w.type.name not in DECODERS:
        raise ValueError(f"{w.name}: {GGMLType(w.type).name} cannot be dequantized")
    rows, columns = w.shape
    expected = (rows, row_bytes(w.type, columns))
    raw = w.raw
    if raw.dtype != np.uint8 or raw.shape != expected:
        raise ValueError(f"{w.name}: packed rows are {raw.dtype} {raw.shape}, must be uint8 {expected}")
    if raw.size and raw.strides[1] != 1:
        raw = np.ascontiguousarray(raw)
    decoder = DECODERS.get(w.type.name)
    usable = decoder is not None and columns % decoder.block_size == 0
    weight = PreparedWeight(
        type=w.type,
        rows=rows,
        columns=columns,
        raw=raw,
        address=array_address(raw),
        stride=raw.strides[0],
        n_blocks=columns // decoder.block_size if decoder is not None else 0,
        kernels=usable,
    )
    with suppress(TypeError):
        _prepared[w] = weight
    return weight


def _reference(x: Float32Array, weight: PreparedWeight) -> Float32Array:
    out = np.empty((x.shape[0], weight.rows), dtype=np.float32)
    step = max(1, REFERENCE_TILE // max(1, weight.columns))
    for low in range(0, weight.rows, step):
        tile = FORMATS[weight.type].dequantize(weight.raw[low : low + step])
        np.matmul(x, tile.T, out=out[:, low : low + step])
    return out


def dot_kind(n_tokens: int) -> str:
    """The kernel that multiplies this many rows, at most DOT_TOKENS."""
    return "dot_rows" if n_tokens == 1 else "dot_tokens"


def dot_operands(
    x: Float32Array,
    weight: PreparedWeight,
    out: Float32Array,
    *,
    scale: float = 1.0,
    bias: Float32Array | None = None,
    residual: Float32Array | None = None,
) -> tuple[int, ...]:
    """The numbers that the kernels dot_rows and dot_tokens read (kernels/products.py)."""
    extra = (0 if bias is None else array_address(bias), *((0, 0) if residual is None else _placed(residual)))
    packed = (weight.address, weight.stride, weight.n_blocks)
    (scale_bits,) = struct.unpack("q", struct.pack("d", scale))
    return (*packed, *_placed(x), len(x), *_placed(out), scale_bits, *extra)


def _placed(array: Float32Array) -> tuple[int, int]:
    return array_address(array), array.strides[0]


def _dot(x: Float32Array, weight: PreparedWeight, out: Float32Array, pool: ThreadPool) -> None:
    n_tokens = x.shape[0]
    dot = _kernel(dot_kind(n_tokens), weight.type.name)
    operands = np.array(dot_operands(x, weight, out), dtype=np.int64)
    start = array_address(operands)
    rows = weight.rows
    # A few tasks per thread even out threads that start late or run beside other programs.
    n_tasks = min(4 * pool.threads, n_tokens * rows * weight.columns // DOT_TASK_WEIGHTS)
    if n_tasks < 2 or pool.threads == 1:
        dot(start, 0, rows, 0)
        return

    def task(index: int) -> None:
        assert operands.size and x.size and out.size  # a task that starts late keeps its arrays alive
        dot(start, rows * index // n_tasks, rows * (index + 1) // n_tasks, 0)

    pool.run(task, n_tasks)


def _product(x: Float32Array, weight: PreparedWeight, out: Float32Array, pool: ThreadPool) -> None:
    n_tokens, rows = out.shape
    columns = -(-weight.columns // LANES) * LANES
    stride = _spread(4 * columns)
    padded = aligned_empty(n_tokens, stride, dtype=np.uint8).view(np.float32)
    padded[:, : weight.columns] = x
    padded[:, weight.columns : columns] = 0
    multiply = partial(_multiply_tile, _kernel("product_f32"), weight, padded, columns, out)
    if rows * weight.columns * n_tokens < DOT_TASK_WEIGHTS * 16 or pool.threads == 1:
        tile = _rows_per_tile(stride)
    else:
        tile = min(_rows_per_tile(stride), -(-rows // (2 * pool.threads * ROWS_STEP)) * ROWS_STEP)
    n_tiles = -(-rows // tile)

    def task(index: int) -> None:
        multiply(index * tile, min(rows, (index + 1) * tile))

    pool.run(task, n_tiles)


def _multiply_tile(
    product: Callable[..., None],
    weight: PreparedWeight,
    x: Float32Array,
    columns: int,
    out: Float32Array,
    low: int,
    high: int,
) -> None:
    """Dequantizes rows low..high-1 into this thread's scratch and multiplies them with all of x."""
    from engine.cpu.kernels.products import PARTIAL_BYTES

    n_rows, stride = high - low, _spread(4 * columns)
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.nbytes < n_rows * stride + PARTIAL_BYTES:
        buffer = _scratch.buffer = aligned_empty(n_rows * stride + PARTIAL_BYTES, dtype=np.uint8)
    start = array_address(buffer)
    tile = start + PARTIAL_BYTES
    if weight.kernels:
        packed = weight.address + low * weight.stride
        _kernel("dequantize_rows", weight.type.name)(packed, weight.stride, weight.n_blocks, tile, stride, n_rows)
    else:
        floats = buffer[PARTIAL_BYTES : PARTIAL_BYTES + n_rows * stride].reshape(n_rows, stride).view(np.float32)
        floats[:, : weight.columns] = FORMATS[weight.type].dequantize(weight.raw[low:high])
        floats[:, weight.columns : columns] = 0
    target, out_stride = array_address(out) + 4 * low, out.strides[0]
    product(tile, stride, n_rows, array_address(x), x.strides[0], x.shape[0], columns, target, out_stride, start)


def _rows_per_tile(stride: int) -> int:
    return max(1, min(8, SCRATCH_BYTES // (stride * ROWS_STEP))) * ROWS_STEP


def _spread(n_bytes: int) -> int:
    """A row stride of at least n_bytes that maps neighbouring rows to different cache sets.

    Rows a multiple of 4 KB apart compete for the same few lines of the first-level cache: on an EPYC 7003 core,
    48 x 2048 times 128 tokens ran at 45 GFLOP/s with such rows and at 61 with these.
    """
    return n_bytes + (2048 + 64 - n_bytes) % 4096


def array_address(array: npt.NDArray[Any]) -> int:
    """Where an array begins in memory."""
    address: int = array.__array_interface__["data"][0]
    return address
