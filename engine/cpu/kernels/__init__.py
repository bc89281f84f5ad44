"""Compiled CPU kernels: the only place of the package that imports numba.

    emit.py       a few functions for writing 16-lane vector code (LLVM IR through numba's @intrinsic)
    isa.py        sums of integer products in each instruction set
    processor.py  which of them this machine has
    stepping.py   the one shape of kernel that programs call
    formats/      one decoder per block format: packed bytes in, vectors of weights out
    terms.py      what one step of a product in floats multiplies
    products.py   the loops built from them: dot_rows, dot_tokens, dequantize_rows
    blocked.py    the product of plain or dequantized rows with many rows: product
    integer/      activations of 8 bits, panels of eight rows, integer products of one row and of many
    attention/    attention over a packed cache, and what callers ask for it (for matrix products: ../products/)
    elementwise.py  the small steps between: normalize, rotate_store, gate
    machine.py    runs a whole recorded decode step on all threads
    settings.py   settings of numba that cannot work here
    build.py      compiles what is asked for, caches it on disk, hands out callables
    code_cache.py  the files of that cache, checked before they are used

Kernels take addresses and lengths, no weights or models.
"""

from engine.cpu.kernels.settings import check_before_import

check_before_import()
