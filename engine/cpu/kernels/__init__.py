"""Compiled CPU kernels: the only place of the package that imports numba.

    emit.py       a few words for writing 16-lane vector code (LLVM IR through numba's @intrinsic)
    formats.py    one decoder per block format: packed bytes in, vectors of weights out
    products.py   the three loops built from them: dot_rows, dequantize_rows, product_f32
    small.py      fused small steps: norm, rotary embedding, activation, attention over the cache
    build.py      compiles what is asked for, caches it on disk, hands out callables

Nothing here knows of weights, models or threads: kernels take addresses and lengths. Importing this package is free;
importing build.py imports numba.
"""
