"""The grids of the IQ formats as text for the compiler, which a kernel gets for the formats that its defines name.

An index names 4 or 8 numbers, each one of up to eight values (engine/gguf/formats/grids.py). The table keeps half a
byte per number, its place among the values, four numbers in 16 bits: what one byte permutation expands. With
SHARED_GRIDS defined it is brought into shared memory first, where 32 look-ups at once meet fewer conflicts. Must not
know of models or devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np

from engine.gguf.formats.grids import grid
from engine.gguf.types import GGMLType

_GRIDS = {name: name for name in ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")} | {"IQ1_M": "IQ1_S"}
"""Which grid a format reads."""


def grid_bytes(types: Iterable[GGMLType]) -> int:
    """Bytes of the tables of all grids that formats read, each its own."""
    return sum(grid(_GRIDS[type.name]).size // 2 for type in set(types) if type.name in _GRIDS)


def grids_of(defines: Iterable[object]) -> list[str]:
    """The text of every grid that values of defines name, sorted."""
    return [_text(name) for name in sorted(_GRIDS.keys() & {str(value) for value in defines})]


@cache
def _text(name: str) -> str:
    """The grid of a format: a specialization of GridOf, which formats_coded.cuh describes."""
    points = grid(_GRIDS[name])
    values = np.unique(points)
    places = np.searchsorted(values, points).astype(np.uint16).reshape(-1, 4)
    table = np.bitwise_or.reduce(places << np.arange(0, 16, 4, dtype=np.uint16), axis=1)
    low, high = np.resize(np.append(values, np.zeros(8 - len(values), np.int8)), 8).view("<u4")
    return (
        f"template <class F> struct GridOf;\nstruct {name};\n"
        f"static __device__ const __align__(16) unsigned short {name}_POINTS[] = {{{','.join(map(str, table))}}};\n"
        "#ifdef SHARED_GRIDS\n"
        f"static __shared__ __align__(16) unsigned short {name}_SHARED[{len(table)}];\n"
        "#endif\n"
        f"template <> struct GridOf<{name}> {{\n"
        f"    static constexpr unsigned LOW = {low}u, HIGH = {high}u;\n"
        "    static constexpr bool ANY = true;\n"
        "#ifdef SHARED_GRIDS\n"
        f"    static __device__ __forceinline__ unsigned at(int i) {{ return {name}_SHARED[i]; }}\n"
        "    static __device__ __forceinline__ void bring(int first, int step) {\n"
        f"        for (int i = first; i < {len(table) // 8}; i += step)\n"
        f"            ((uint4*){name}_SHARED)[i] = ((const uint4*){name}_POINTS)[i];\n"
        "    }\n"
        "#else\n"
        f"    static __device__ __forceinline__ unsigned at(int i) {{ return {name}_POINTS[i]; }}\n"
        "#endif\n"
        "};"
    )
