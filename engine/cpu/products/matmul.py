"""Matrix products straight from packed weights: x @ W.T, the one place where the CPU multiplies.

`reference=True` computes in plain numpy, for comparison. The fast path runs compiled kernels over ranges of weight rows
in the pool. With `rounded`, activations that meet BF16 weights are rounded to BF16 where the processor multiplies such
pairs twice as fast. A few rows of x are multiplied by fused dequantize-and-dot kernels; for more, a tile of weight rows
is multiplied by a blocked kernel. It reads plain numbers as they are; longer blocks are first dequantized into the
thread's scratch.

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
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from engine.cpu.memory import aligned_empty, array_address
from engine.cpu.products.rows import rounded_rows, spread, spread_rows
from engine.gguf.quants import FORMATS, GGMLType, row_bytes

if TYPE_CHECKING:
    from engine.cpu.threads import ThreadPool
    from engine.model.weights import Weight

Float32Array = npt.NDArray[np.float32]

LANES = 16  # columns per vector of the kernels; tests/cpu/products/test_matmul.py holds it equal to kernels.emit.LANES

REFERENCE_TILE = 1 << 21
"""Numbers per dequantized tile of the reference path (16 MB in float64)."""

SCRATCH_BYTES = 1536 << 10
"""Weights per tile of the fast path at most, of which the second-level cache holds a chunk of columns."""

ROWS_STEP = 6
"""Tiles are a multiple of it, the rows of the blocked kernel's register tile."""

DOT_TASK_WEIGHTS = 1 << 17
"""Least weights per task of a product of one row: 20 us of work at 6e9 weights/s, as much as waking a thread costs."""

DOT_TOKENS = 8
"""Rows of x up to which weights are decoded in registers, four rows at a time, instead of into scratch."""


@dataclass(frozen=True)
class PreparedWeight:
    """What a product needs of a weight, checked once: kernels read no byte outside it.

    `kernels` says whether the compiled decoder reads these rows; otherwise numpy dequantizes each tile. `plain` says
    whether it reads plain numbers, no longer blocks, so that a product need not dequantize them first. `kernel_type` is
    the type of the kernels that read them.
    """

    type: GGMLType
    rows: int
    columns: int
    raw: npt.NDArray[np.uint8]
    address: int
    stride: int
    n_blocks: int
    kernels: bool
    plain: bool
    kernel_type: str = "F32"


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What becomes of a product p: scale · p + bias + residual, with bias (N,) and residual (T, N) float32."""

    scale: float = 1.0
    bias: Float32Array | None = None
    residual: Float32Array | None = None

    def operands(self) -> tuple[int, int, int, int]:
        """The numbers that the kernels of products read last."""
        (scale_bits,) = struct.unpack("q", struct.pack("d", self.scale))
        bias = 0 if self.bias is None else array_address(self.bias)
        return (scale_bits, bias, *((0, 0) if self.residual is None else _placed(self.residual)))


NOTHING = Epilogue()

_prepared: WeakKeyDictionary[Any, PreparedWeight] = WeakKeyDictionary()
_scratch = threading.local()


def matmul(
    x: npt.ArrayLike,
    w: Weight,
    *,
    pool: ThreadPool,
    reference: bool = False,
    epilogue: Epilogue = NOTHING,
    rounded: bool = False,
) -> Float32Array:
    """Computes x @ W.T, W dequantized during the product; float32 throughout, unless rounded or the reference.

    Args:
        x: (T, K) activations, any strides; T may be 0.
        w: a weight of shape (N, K) whose raw is uint8 (N, row bytes), possibly a slice of a larger one.
        pool: threads to use.
        reference: plain numpy, one tile of at most 16 MB at a time, without epilogue. Sums are taken in float64 and
            rounded once: sums in float32 depend on T and on the processor that numpy's library finds, and a last bit
            moves a number that is rounded afterwards (float16 of GELU, a cache of 8 bits) by a whole step.
        epilogue: what becomes of the product; the last axis of bias and residual has no gaps.
        rounded: see prepare().

    Returns:
        (T, N) float32, a new array.

    Raises:
        ValueError: shapes do not fit, or the type cannot be dequantized.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    weight = prepare(w, rounded=rounded and not reference)
    if x.ndim != 2 or x.shape[1] != weight.columns:
        raise ValueError(f"{w.name}: x is {x.shape}, must be (tokens, {weight.columns})")
    n_tokens = x.shape[0]
    if reference:
        assert epilogue is NOTHING
        return _reference(x, weight)
    out: Float32Array = pool.memory.empty(n_tokens, weight.rows)
    if 1 <= n_tokens <= DOT_TOKENS and weight.kernels:
        _dot(x, weight, out, epilogue, pool)
    elif n_tokens:
        _product(x, weight, out, epilogue, pool)
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

    products = [("product", "F32")]
    for name in [name for name in dict.fromkeys(GGMLType(type).name for type in types) if name in DECODERS]:
        status(f"preparing kernels: {name}")
        *dots, product = kernel_names(GGMLType[name])
        products.append(product)
        for kind, kernel_type in dots:
            _kernel(kind, kernel_type)
    status("preparing kernels: product")
    for kind, kernel_type in dict.fromkeys(products):
        _kernel(kind, kernel_type)
    if kv_type is not None:
        status("preparing kernels: attention")
        for kind, type_name in (("attend", kv_type.upper()), ("rotate_store", kv_type.upper())):
            _kernel(kind, type_name)
        for kind, type_name in (("normalize", "RMS"), ("gate", "SILU"), ("run_program", "F32")):
            _kernel(kind, type_name)


def kernel_names(type: GGMLType, *, rounded: bool = False) -> list[tuple[str, str]]:
    """Kind and type of the kernels that weights of a type are multiplied by in floats."""
    from engine.cpu.kernels.formats.decoders import DECODERS
    from engine.cpu.kernels.terms import PAIRS, has_pairs

    decoder, name = DECODERS.get(type.name), type.name
    plain = decoder is not None and decoder.block_size == LANES
    names = [("product", name if plain else "F32")]
    if decoder is not None:
        names = [("dot_rows", name), ("dot_tokens", name), ("dequantize_rows", name), *names]
    if rounded and type is GGMLType.BF16 and has_pairs():
        names += [(kind, PAIRS) for kind in ("dot_rows", "dot_tokens", "round_rows", "product")]
    return names


@cache
def _kernel(kind: str, type_name: str = "F32") -> Callable[..., None]:
    from engine.cpu.kernels.build import kernel  # numba is not imported before it is needed

    return kernel(kind, type_name)


def prepare(w: Weight, *, rounded: bool = False) -> PreparedWeight:
    """Check a weight's shape and layout, once.

    Args:
        w: a weight.
        rounded: for products of BF16 with activations rounded to BF16, where there are kernels for them.

    Raises:
        ValueError: it is not a packed matrix, or its type cannot be dequantized.
    """
    try:
        weight = _prepared.get(w)
    except TypeError:  # not hashable: checked each time, which is slower
        weight = None
    weight = weight if weight is not None else _prepare(w)
    return _as_pairs(weight) if rounded and weight.type is GGMLType.BF16 else weight


def _as_pairs(weight: PreparedWeight) -> PreparedWeight:
    from engine.cpu.kernels.terms import PAIR_COLUMNS, PAIRS, has_pairs

    if not weight.plain or weight.columns % PAIR_COLUMNS or not has_pairs():
        return weight
    return replace(weight, kernel_type=PAIRS, n_blocks=weight.columns // PAIR_COLUMNS)


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
        plain=usable and decoder is not None and decoder.block_size == LANES,
        kernel_type=w.type.name,
    )
    with suppress(TypeError):
        _prepared[w] = weight
    return weight


def _reference(x: Float32Array, weight: PreparedWeight) -> Float32Array:
    out = np.empty((x.shape[0], weight.rows), dtype=np.float32)
    wide = x.astype(np.float64)
    step = max(1, REFERENCE_TILE // max(1, weight.columns))
    for low in range(0, weight.rows, step):
        tile = FORMATS[weight.type].dequantize(weight.raw[low : low + step])
        out[:, low : low + step] = wide @ tile.T.astype(np.float64)
    return out


def dot_kind(n_tokens: int) -> str:
    """The kernel that multiplies this many rows, at most DOT_TOKENS."""
    return "dot_rows" if n_tokens == 1 else "dot_tokens"


def dot_operands(
    x: Float32Array, weight: PreparedWeight, out: Float32Array, epilogue: Epilogue = NOTHING
) -> tuple[int, ...]:
    """The numbers that the kernels dot_rows and dot_tokens read (kernels/products.py)."""
    packed = (weight.address, weight.stride, weight.n_blocks)
    return (*packed, *_placed(x), len(x), *_placed(out), *epilogue.operands())


def _placed(array: npt.NDArray[Any]) -> tuple[int, int]:
    return array_address(array), array.strides[0]


def _dot(x: Float32Array, weight: PreparedWeight, out: Float32Array, epilogue: Epilogue, pool: ThreadPool) -> None:
    n_tokens = x.shape[0]
    dot = _kernel(dot_kind(n_tokens), weight.kernel_type)
    operands = np.array(dot_operands(x, weight, out, epilogue), dtype=np.int64)
    start = array_address(operands)
    rows = weight.rows
    # A few tasks per thread even out threads that start late or run beside other programs.
    n_tasks = min(4 * pool.threads, n_tokens * rows * weight.columns // DOT_TASK_WEIGHTS)
    if n_tasks < 2 or pool.threads == 1:
        dot(start, 0, rows, 0)
        return

    def task(index: int) -> None:
        assert operands.size and x.size and out.size and epilogue  # a task that starts late keeps its arrays alive
        dot(start, rows * index // n_tasks, rows * (index + 1) // n_tasks, 0)

    pool.run(task, n_tasks)


def _product(x: Float32Array, weight: PreparedWeight, out: Float32Array, epilogue: Epilogue, pool: ThreadPool) -> None:
    from engine.cpu.kernels.blocked import ROWS_BLOCK
    from engine.cpu.kernels.terms import PAIRS

    columns = -(-weight.columns // LANES) * LANES
    rows: npt.NDArray[Any]
    if weight.kernel_type == PAIRS:
        rows = rounded_rows(x, columns, _kernel("round_rows", PAIRS), pool)
    else:
        rows = spread_rows(x, columns, pool)
    stride, address = (weight.stride, weight.address) if weight.plain else (spread(4 * columns), 0)
    numbers = (stride, columns, *_placed(rows), len(x), *_placed(out), *epilogue.operands(), address)
    operands = np.array(numbers, dtype=np.int64)
    multiply = partial(_multiply_tile, array_address(operands), weight, stride)
    # Tiles are whole register tiles, as many for each thread where the work is worth it.
    steps, most = -(-weight.rows // ROWS_STEP), max(1, min(ROWS_BLOCK, SCRATCH_BYTES // abs(stride)) // ROWS_STEP)
    n_tiles = -(-steps // most)
    if len(x) * weight.rows * weight.columns >= DOT_TASK_WEIGHTS * 16:
        n_tiles = -(-max(n_tiles, 2 * pool.threads) // pool.threads) * pool.threads

    def task(index: int, held: object = (operands, rows, out, epilogue)) -> None:
        low, high = (steps * at // n_tiles * ROWS_STEP for at in (index, index + 1))
        multiply(low, min(weight.rows, high))

    pool.run(task, n_tiles)


def _multiply_tile(operands: int, weight: PreparedWeight, stride: int, low: int, high: int) -> None:
    """Multiplies rows low..high-1 with all of x, dequantized into this thread's scratch unless they are plain."""
    from engine.cpu.kernels.blocked import PARTIAL_BYTES

    n_rows = high - low
    n_bytes = PARTIAL_BYTES + (0 if weight.plain else n_rows * stride)
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.nbytes < n_bytes:
        buffer = _scratch.buffer = aligned_empty(n_bytes, dtype=np.uint8)
    start = array_address(buffer)
    if weight.plain:
        pass  # read where they are
    elif weight.kernels:
        packed, target = weight.address + low * weight.stride, start + PARTIAL_BYTES
        _kernel("dequantize_rows", weight.type.name)(packed, weight.stride, weight.n_blocks, target, stride, n_rows)
    else:
        floats = buffer[PARTIAL_BYTES : PARTIAL_BYTES + n_rows * stride].reshape(n_rows, stride).view(np.float32)
        floats[:, : weight.columns] = FORMATS[weight.type].dequantize(weight.raw[low:high])
        floats[:, weight.columns : -(-weight.columns // LANES) * LANES] = 0
    _kernel("product", weight.kernel_type if weight.plain else "F32")(operands, low, high, start)
