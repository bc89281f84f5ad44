"""Rows that share experts, compiled for the CPU: runs of several groups, and blocks that begin within one."""

import ctypes
import re

import numpy as np
import pytest

from engine.cuda.driver.compiler import kernel_files, kernel_source
from engine.cuda.experts import moe_rows
from engine.cuda.experts.router import KernelRouting
from engine.cuda.formats.layouts import LAYOUTS, packed_bytes
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.quants import dequantize, row_bytes
from engine.gguf.types import GGMLType
from tests.support.gpu.expert_reference import TOLERANCE, WORST_ROW, routed, silu
from tests.support.gpu.host_kernels import address, host_library
from tests.support.gpu.packed_rows import random_rows

Q4, Q5, Q6, Q8, F16 = GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F16
WARPS = 4
"""Of a block: few, since the threads of a block take turns."""
BEGIN_THREADS = 512
SHARED = re.compile(r"extern __shared__ (.*?)\[\];")

PRODUCTS = """
extern "C" void pack_{name}(const u8* first, const u8* second, u8* out, int rows, int columns, i64 row_bytes,
                            int chunks, i64 total) {{
    launch(2, 1, 64, [&] {{
        {name}::repack_{type}(first, second, out, nullptr, rows, columns, row_bytes, chunks, total);
    }});
}}
"""

LAUNCHES = """
extern "C" void begin(int rows, const int* ids, int used, int experts, const float* x, int columns, const float* norm,
                      int most, int* table, int* places, u8* operand) {
    launch_blocks(rows, 1, BEGIN_THREADS, [&] {
        of_begin::moe_rows_begin(
            ids, nullptr, used, experts, x, columns, norm, 1e-6f, columns, 0, most, table, places, operand);
    });
}
extern "C" void products(int blocks, int width, int columns, const int* table, const u8* gate_up, int gate_up_chunks,
                         const u8* down, int down_chunks, const u8* operand, u8* hidden, float* y) {
    launch_blocks(blocks, 1, BLOCK_THREADS, [&] {
        gate_up::moe_rows_gate_up(
            gate_up, nullptr, width / 8, gate_up_chunks, width, table, operand, nullptr, nullptr, hidden);
    });
    launch_blocks(blocks, 1, BLOCK_THREADS, [&] {
        down::moe_rows_down(down, nullptr, columns / 16, down_chunks, columns, table, hidden, nullptr, y);
    });
}
"""


def text_of(*names):
    """Kernel files whose dynamic shared memory is an array, and whose kernels are functions."""
    text = "".join(kernel_files()[name].read_text(encoding="utf-8") for name in names)
    text = SHARED.sub(r"static \1[227 << 10];", text).replace('extern "C" __global__', "static")
    return re.sub(r'asm\("ex2\..*?;\n', "y = exp2f(x);\n", text)


def between(text, first, last=None):
    start = text.index(first)
    return text[start : text.index(last, start) if last else None]


def build(folder, types, tunings):
    """Both products of a pair of types, what precedes them, and repacking."""
    formats = kernel_source(("formats.cuh", "formats_coded.cuh"), {type.name: type.name for type in LAYOUTS})
    source = f'#include "barriers_on_host.h"\n#define ACTIVATION {int(KernelActivation.SILU)}\n'
    source += between(formats, "template <class F> struct GridOf", '#line 1 "common.cuh"')
    source += between(formats, '#line 1 "formats.cuh"') + between(
        text_of("half_pairs.cuh"), "// ---- without instructions"
    )
    packing = text_of("repack.cu")
    source += between(packing, "template <class F, bool SCALED", "#ifdef FORMAT")
    source += text_of("gemm_unpack.cuh", "formats_half.cuh", "activation.cuh")
    repack = between(packing, "#ifdef FORMAT", "#endif").removeprefix("#ifdef FORMAT")
    for name, type, tuning in zip(("gate_up", "down"), types, tunings, strict=True):
        defines = moe_rows.defines_of(type, KernelActivation.SILU, tuning) | {"FORMAT": type.name}
        del defines["ACTIVATION"]
        source += "".join(f"\n#define {key} {value}" for key, value in defines.items())
        source += f"\nnamespace {name} {{\n{repack}{text_of('moe_rows_columns.cuh', 'moe_rows.cu')}\n}}"
        source += PRODUCTS.format(name=name, type=type.name) + "".join(f"\n#undef {key}" for key in defines)
    source += f"\nnamespace of_begin {{\n{text_of('decode_gemm_convert.cuh', 'moe_rows_begin.cu')}\n}}\n"
    launches = LAUNCHES.replace("BLOCK_THREADS", str(32 * WARPS)).replace("BEGIN_THREADS", str(BEGIN_THREADS))
    return host_library(folder, source + launches)


def aligned(n_bytes):
    """Bytes that make not-a-numbers, as bulk copies want them."""
    room = np.full(n_bytes + 1024, 255, np.uint8)
    start = -room.ctypes.data % 1024
    return room[start : start + n_bytes]


@pytest.mark.parametrize(
    ("types", "size", "rows", "pages", "blocks"),
    [
        ((Q4, Q6), (256, 512), 60, 3, 5),
        ((Q6, Q4), (256, 512), 40, 0, 5),
        ((Q5, Q8), (256, 512), 40, 4, 7),
        ((Q8, F16), (384, 640), 20, 3, 4),  # half a block of inputs at the end
    ],
    ids=str,
)
def test_runs_of_groups_against_float64(tmp_path, types, size, rows, pages, blocks):
    e, used, (f, d) = 4, 2, size
    rng = np.random.default_rng(3)
    tunings = [moe_rows.Tuning(1, 2, pages, WARPS) for _ in types]
    library = build(tmp_path, types, tunings)
    shapes = ((types[0], f, d), (types[0], f, d), (types[1], d, f))
    raw = [random_rows(rng, type, e * n, k) for type, n, k in shapes]
    gate, up, down = (
        dequantize(one.reshape(-1), type).astype(np.float64).reshape(e, n, k)
        for one, (type, n, k) in zip(raw, shapes, strict=True)
    )

    def packed(name, type, first, second, columns):
        tile_rows, chunks = (8 if second is not None else 16), LAYOUTS[type].chunks(columns)
        out = aligned(packed_bytes(type, len(first), columns, paired=second is not None))
        getattr(library, f"pack_{name}")(
            address(first), None if second is None else address(second), address(out), len(first), columns,
            ctypes.c_longlong(row_bytes(type, columns)), chunks, ctypes.c_longlong(len(first) // tile_rows * chunks),
        )  # fmt: skip
        return address(out), chunks, out

    stacks = packed("gate_up", types[0], raw[0], raw[1], d), packed("down", types[1], raw[2], None, f)
    x = rng.standard_normal((rows, d)).astype(np.float32)
    norm = (rng.standard_normal(d) * 2 / gate.std() / d**0.5).astype(np.float32)
    scores = rng.standard_normal((rows, e)).astype(np.float32)
    scores[: rows // 2] = scores[0]  # experts with more groups than a run has
    routing = KernelRouting(e, used)
    ids = routed(routing, scores)[0].astype(np.int32)
    operand, hidden, table = (aligned(n) for n in moe_rows.section_bytes(rows, routing, f, d)[:3])
    places = np.zeros((rows, used), np.int32)
    library.begin(
        rows, address(ids), used, e, address(x), d, address(norm), moe_rows.RUN, address(table), address(places),
        address(operand),
    )  # fmt: skip
    y = aligned(len(operand))
    library.products(
        blocks, f, d, address(table), *stacks[0][:2], *stacks[1][:2], address(operand), address(hidden), address(y)
    )
    counts = np.bincount(ids.reshape(-1), minlength=e)
    runs, groups = table.view(np.int32)[:2]
    whole = moe_rows.RUN * moe_rows.GROUP
    assert (runs, groups) == (np.sum(-(-counts // whole)), np.sum(-(-counts // moe_rows.GROUP)))
    n = x.astype(np.float64)
    n = n / np.sqrt((n**2).mean(1, keepdims=True) + 1e-6) * norm
    found = y.view(np.float32)[: 8 * groups * d].reshape(-1, d)[places].astype(np.float64)
    errors = []
    for row in range(rows):
        for u, one in enumerate(ids[row]):
            truth = down[one] @ (silu(gate[one] @ n[row]) * (up[one] @ n[row]))
            errors.append(((found[row, u] - truth) ** 2).sum() / (truth**2).sum())
    assert np.mean(errors) < TOLERANCE, np.mean(errors)
    assert np.max(errors) < WORST_ROW, np.max(errors)
