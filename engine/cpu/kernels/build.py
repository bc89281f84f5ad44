"""Compiles kernels on first use and keeps them on disk; hands out plain callables that release the GIL.

Cached code is where numba keeps it: in the folder that NUMBA_CACHE_DIR names, else in __pycache__ beside this file,
else in the user's cache folder; when none can be written each process compiles the kernels again, with a warning. Each
kernel of each version of these sources has cache files of its own, so processes that compile at the same time can only
write the same content. A damaged file is replaced (code_cache.py).
"""

# ruff: noqa: ANN001, ANN202 - numba types the inner functions by the signatures in products.ARGUMENTS.
# mypy: disable-error-code="no-untyped-def"

import hashlib
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from llvmlite.binding import ffi, initialize_native_asmparser
from numba import njit, types
from numba.core.compiler_lock import global_compiler_lock

from engine.concurrency import fork
from engine.cpu.kernels import blocked, convolution, elementwise, machine, products, recurrent, scans, settings
from engine.cpu.kernels.attention import loop as attention_loop
from engine.cpu.kernels.code_cache import KernelCache, warn_not_kept
from engine.cpu.kernels.integer import activations, rows, tiles

Kernel = Callable[..., None]

_lock = fork.new_lock()
# A child may be forked while another thread compiles.
fork.renew(getattr(global_compiler_lock, "_lock", None))
fork.renew(getattr(getattr(ffi.lib, "_lock", None), "_lock", None))


@lru_cache(maxsize=1)
def _version() -> str:
    # numba looks only at the file of the cached function; the code generators are in the files around it, and the
    # tables that they put into the code beside the formats.
    digest, engine = hashlib.sha256(), Path(__file__).parents[2]
    for source in sorted([*Path(__file__).parent.rglob("*.py"), *(engine / "gguf" / "formats").glob("*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _dot_rows(name: str) -> Kernel:
    def dot_rows(operands, low, high, scratch):
        products.dot_rows(name, operands, low, high, scratch)

    return dot_rows


def _dot_tokens(name: str) -> Kernel:
    def dot_tokens(operands, low, high, scratch):
        products.dot_tokens(name, operands, low, high, scratch)

    return dot_tokens


def _dequantize_rows(name: str) -> Kernel:
    def dequantize_rows(raw, row_bytes, n_blocks, out, out_bytes, n_rows):
        products.dequantize_rows(name, raw, row_bytes, n_blocks, out, out_bytes, n_rows)

    return dequantize_rows


def _round_rows(name: str) -> Kernel:
    def round_rows(x, x_bytes, n_blocks, out, out_bytes, n_rows):
        products.round_rows(name, x, x_bytes, n_blocks, out, out_bytes, n_rows)

    return round_rows


def _product(name: str) -> Kernel:
    def product(operands, low, high, scratch):
        blocked.product(name, operands, low, high, scratch)

    return product


def _quantize(name: str) -> Kernel:
    def quantize(operands, low, high, scratch):
        activations.quantize(name, operands, low, high, scratch)

    return quantize


def _pack_panels(name: str) -> Kernel:
    def pack_panels(operands, low, high, scratch):
        rows.pack_panels(name, operands, low, high, scratch)

    return pack_panels


def _dot_panels(name: str) -> Kernel:
    def dot_panels(operands, low, high, scratch):
        rows.dot_panels(name, operands, low, high, scratch)

    return dot_panels


def _tile_panels(name: str) -> Kernel:
    def tile_panels(operands, low, high, scratch):
        tiles.tile_panels(name, operands, low, high, scratch)

    return tile_panels


def _attend(name: str) -> Kernel:
    def attend(operands, low, high, scratch):
        attention_loop.attend(name, operands, low, high, scratch)

    return attend


def _normalize(name: str) -> Kernel:
    def normalize(operands, low, high, scratch):
        elementwise.normalize(name, operands, low, high, scratch)

    return normalize


def _rotate_store(name: str) -> Kernel:
    def rotate_store(operands, low, high, scratch):
        elementwise.rotate_store(name, operands, low, high, scratch)

    return rotate_store


def _gate(name: str) -> Kernel:
    def gate(operands, low, high, scratch):
        elementwise.gate(name, operands, low, high, scratch)

    return gate


def _take_columns(name: str) -> Kernel:
    def take_columns(operands, low, high, scratch):
        elementwise.take_columns(name, operands, low, high, scratch)

    return take_columns


def _convolve(name: str) -> Kernel:
    def convolve(operands, low, high, scratch):
        convolution.convolve(name, operands, low, high, scratch)

    return convolve


def _delta_rule(name: str) -> Kernel:
    def delta_rule(operands, low, high, scratch):
        recurrent.delta_rule(name, operands, low, high, scratch)

    return delta_rule


def _grouped_scan(name: str) -> Kernel:
    def grouped_scan(operands, low, high, scratch):
        scans.grouped_scan(name, operands, low, high, scratch)

    return grouped_scan


def _selective_scan(name: str) -> Kernel:
    def selective_scan(operands, low, high, scratch):
        scans.selective_scan(name, operands, low, high, scratch)

    return selective_scan


def _run_program(name: str) -> Kernel:
    def run_program(program, n_rows, counters, n_regions, region, scratch, give_way):
        machine.run_program(name, program, n_rows, counters, n_regions, region, scratch, give_way)

    return run_program


_ARGUMENTS = (
    products.ARGUMENTS
    | blocked.ARGUMENTS
    | activations.ARGUMENTS
    | rows.ARGUMENTS
    | tiles.ARGUMENTS
    | attention_loop.ARGUMENTS
    | elementwise.ARGUMENTS
    | convolution.ARGUMENTS
    | recurrent.ARGUMENTS
    | scans.ARGUMENTS
    | machine.ARGUMENTS
)

_MAKERS: dict[str, Callable[[str], Kernel]] = {
    "dot_rows": _dot_rows,
    "dot_tokens": _dot_tokens,
    "dequantize_rows": _dequantize_rows,
    "round_rows": _round_rows,
    "product": _product,
    "quantize": _quantize,
    "pack_panels": _pack_panels,
    "dot_panels": _dot_panels,
    "tile_panels": _tile_panels,
    "attend": _attend,
    "normalize": _normalize,
    "rotate_store": _rotate_store,
    "gate": _gate,
    "take_columns": _take_columns,
    "convolve": _convolve,
    "delta_rule": _delta_rule,
    "grouped_scan": _grouped_scan,
    "selective_scan": _selective_scan,
    "run_program": _run_program,
}


def _compile(function: Kernel, signature: Any) -> Kernel:
    """Compiles through the disk cache if there is a usable one."""
    settings.check()
    initialize_native_asmparser()
    dispatcher: Any = njit(nogil=True)(function)
    try:
        dispatcher._cache = KernelCache(function)
    except Exception as error:  # no folder that can be written is no reason not to run
        warn_not_kept(str(error))
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    kernel: Kernel = dispatcher
    return kernel


_kernels: dict[tuple[str, str], Kernel] = {}


def kernel(kind: str, type_name: str = "F32") -> Kernel:
    """The compiled kernel `kind`, one of _MAKERS, for one type (of weights, of a cache, or of an activation)."""
    found = _kernels.get((kind, type_name))
    if found is not None:
        return found
    with _lock:
        if (kind, type_name) not in _kernels:
            function = _MAKERS[kind](f"{type_name}:{_version()}")
            function.__name__ = function.__qualname__ = f"{kind}_{type_name}_{_version()}".replace("/", "_")
            signature = types.void(*_ARGUMENTS[kind])
            _kernels[kind, type_name] = _compile(function, signature)
    return _kernels[kind, type_name]


@cache
def address(kind: str, type_name: str = "F32") -> int:
    """Address of the compiled kernel, callable by C's rules; for machine.py, whose programs name kernels this way."""
    compiled: Any = kernel(kind, type_name)
    (result,) = compiled.overloads.values()
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name))
