"""Compiled CPU kernels: the only place of the package that imports numba.

    emit.py       a few functions for writing 16-lane vector code (LLVM IR through numba's @intrinsic)
    formats.py    one decoder per block format: packed bytes in, vectors of weights out
    grid_formats.py, low_bit_formats.py  more of them: formats with grids; of few bits, of rarely stored numbers
    stepping.py   the one shape of kernel that programs call
    products.py   the loops built from them: dot_rows, dot_tokens, dequantize_rows, product_f32
    panels.py, panel_formats.py  eight rows side by side, and how each format is read from them
    activations.py, isa.py  activations of 8 bits; sums of integer products in each instruction set
    integer.py, tiles.py  integer products of one row of activations, and of many
    attention.py, attention_*.py  attention over a packed cache
    elementwise.py  the small steps between: normalize, rotate_store, gate
    machine.py    runs a whole recorded decode step on all threads
    settings.py   settings of numba that cannot work here
    build.py      compiles what is asked for, caches it on disk, hands out callables
    code_cache.py  the files of that cache, checked before they are used
    attend.py     attention for callers: operands checked, work spread over the pool (matrix products: ../matmul.py)

Kernels take addresses and lengths, no weights or models. Importing this package collects the decoders; only importing
build.py or code_cache.py imports numba.
"""

from engine.cpu.kernels import grid_formats, low_bit_formats  # noqa: F401 - imported for the decoders they register
from engine.cpu.kernels.settings import check_before_import

check_before_import()
