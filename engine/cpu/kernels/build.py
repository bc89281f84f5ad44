"""Compiles kernels on first use and keeps them on disk; hands out plain callables that release the GIL.

Cached code lives where numba keeps it: in __pycache__ beside this file, else in the user's cache folder; when neither
can be written the kernels are compiled again in each process. Each kernel of each version of these sources has cache
files of its own, so processes that compile at the same time can only write the same content.
"""

# ruff: noqa: ANN001, ANN202 - numba types the inner functions by the signatures in products.ARGUMENTS.
# mypy: disable-error-code="no-untyped-def"

import hashlib
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from numba import njit, types

from engine.cpu.kernels import attention, products

Kernel = Callable[..., None]

_lock = threading.Lock()


@lru_cache(maxsize=1)
def _version() -> str:
    # numba looks only at the file of the cached function; the code generators live in its neighbours.
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _dot_rows(name: str) -> Kernel:
    def dot_rows(raw, row_bytes, n_blocks, x, out, low, high):
        products.dot_rows(name, raw, row_bytes, n_blocks, x, out, low, high)

    return dot_rows


def _dot_tokens(name: str) -> Kernel:
    def dot_tokens(raw, row_bytes, n_blocks, x, out, low, high):
        products.dot_tokens(name, raw, row_bytes, n_blocks, x, out, low, high)

    return dot_tokens


def _dequantize_rows(name: str) -> Kernel:
    def dequantize_rows(raw, row_bytes, n_blocks, out, out_bytes, n_rows):
        products.dequantize_rows(name, raw, row_bytes, n_blocks, out, out_bytes, n_rows)

    return dequantize_rows


def _product_f32(name: str) -> Kernel:
    def product_f32(w, w_bytes, n_rows, x, x_bytes, n_tokens, n_columns, out, out_bytes, partial):
        products.product_f32(name, w, w_bytes, n_rows, x, x_bytes, n_tokens, n_columns, out, out_bytes, partial)

    return product_f32


def _attend(name: str) -> Kernel:
    def attend(q, k, v, out, scores, kh, kb, vh, vb, scale, n_tokens, n_heads, group, kw, vw, past, window, low, high):
        attention.attend(
            name, q, k, v, out, scores, kh, kb, vh, vb, scale, n_tokens, n_heads, group, kw, vw, past, window, low, high
        )

    return attend


_ARGUMENTS = products.ARGUMENTS | attention.ARGUMENTS

_MAKERS: dict[str, Callable[[str], Kernel]] = {
    "dot_rows": _dot_rows,
    "dot_tokens": _dot_tokens,
    "dequantize_rows": _dequantize_rows,
    "product_f32": _product_f32,
    "attend": _attend,
}


def _compile(function: Kernel, signature: Any) -> Kernel:
    """Compiles through the disk cache if there is a usable one."""
    try:
        cached: Any = njit(nogil=True, cache=True)(function)
        cached.compile(signature)
    except Exception:
        # No writable folder, a full disk or a damaged entry: none of them is a reason not to run. A fault in the
        # kernel itself shows again here.
        cached = njit(nogil=True)(function)
        cached.compile(signature)
    cached.disable_compile()
    return cached


_kernels: dict[tuple[str, str], Kernel] = {}


def kernel(kind: str, type_name: str = "F32") -> Kernel:
    """The compiled kernel `kind` (dot_rows, dot_tokens, dequantize_rows, product_f32 or attend) for one type."""
    found = _kernels.get((kind, type_name))
    if found is not None:
        return found
    with _lock:
        if (kind, type_name) not in _kernels:
            function = _MAKERS[kind](f"{type_name}:{_version()}")
            function.__name__ = function.__qualname__ = f"{kind}_{type_name}_{_version()}"
            signature = types.void(*_ARGUMENTS[kind])
            _kernels[kind, type_name] = _compile(function, signature)
    return _kernels[kind, type_name]
