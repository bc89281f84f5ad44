"""Packing and unpacking of every type as the GPU does it, compiled for the CPU: bit for bit what numpy decodes.

The kernels that touch packed bytes do so without communication between threads, so a host compiler can run them thread
by thread: repack, dequant, embed, and the operands that matrix-vector products hand to the tensor cores.
"""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from engine.cuda.driver.compiler import kernel_files, kernel_source
from engine.cuda.formats.layouts import LAYOUTS, packed_bytes
from engine.gguf.quants import dequantize, row_bytes
from engine.gguf.types import GGMLType
from tests.support.gpu.host_kernels import address, host_library
from tests.support.models.gguf_builder import random_blocks

TYPES = [type for type in LAYOUTS if type.block_size > 1]
BYTES = TYPES[TYPES.index(GGMLType.Q8_1) :]
"""Those that become halfs through signed bytes."""

DRIVER = """
// value[row][column]: what one lane's operand byte stands for.
template <class F>
static void operands(const u8* data, float* value, int rows, int columns) {
    const int chunks = (columns + F::COLUMNS - 1) / F::COLUMNS;
    for (int unit = 0; unit < (rows + 15) / 16 * chunks; ++unit)
        for (int lane = 0; lane < 32; ++lane)
            for (int quad = 0; quad < F::QUADS; ++quad) {
                const u8* chunk = data + (i64)unit * F::CHUNK_BYTES;
                Operand<F, F::LOW> operand;
                operand.load(chunk, quad, lane);
                for (int s = 0; s < 4; ++s) {
                    u32 a[4];
                    operand.get(s, a);
                    const Scales scales = F::load(chunk, lane >> 2, s);
                    for (int n = 0; n < 16; ++n) {
                        const int row = (n >> 2) & 1, w = n >> 3, i = n & 3;
                        const int at = unit / chunks * 16 + row * 8 + (lane >> 2);
                        const int k = unit % chunks * F::COLUMNS + quad * 128 + s * 32 + w * 16 + (lane & 3) * 4 + i;
                        const u8 byte = (u8)(a[w * 2 + row] >> (8 * i));
                        const float number = F::LOW == 8 || F::CODED ? (float)(signed char)byte : (float)byte;
                        float v = F::mul(scales, quad, row, w) * (number * place_factor<F>(s) - F::OFFSET);
                        if (F::HAS_ADD) v += F::add(scales, quad, row, w);
                        if (at < rows && k < columns) value[(i64)at * columns + k] = v;
                    }
                }
            }
}
"""

HALVES = """
// The same as halfs, for prompts (gemm.cu) and for many sequences (decode_gemm.cu).
template <class F>
static void halves(const u8* data, float* of_gemm, float* of_batch, int rows, int columns) {
    const int chunks = (columns + F::COLUMNS - 1) / F::COLUMNS;
    for (int unit = 0; unit < (rows + 15) / 16 * chunks; ++unit)
        for (int lane = 0; lane < 32; ++lane)
            for (int step = 0; step < F::COLUMNS / 64; ++step) {
                const u8* chunk = data + (i64)unit * F::CHUNK_BYTES;
                gemm::HalfOperands<F, F::LOW> packed;
                gemm::ChunkScales<F> scales;
                gemm::Operands a;
                packed.load(chunk, step, lane);
                packed.make(scales, step, lane, 0x64006400u, a);
                u32 f[2][8];
                for (int i = 0; i < 2; ++i) {
                    const int s = (step & 1) * 2 + i;
                    batch::HalfWeights<F>::fragments(batch::HalfWeights<F>::load(chunk, step >> 1, s, lane), s, f[i]);
                }
                const float2 post = batch::HalfWeights<F>::post(chunk, lane >> 2);
                for (int n = 0; n < 32; ++n) {
                    const int group = n >> 3, odd = (n >> 2) & 1, row = (n >> 1) & 1, high = n & 1;
                    const int at = unit / chunks * 16 + row * 8 + (lane >> 2);
                    const int k = unit % chunks * F::COLUMNS + step * 64 + group * 16 + (lane & 3) * 4 + odd + 2 * high;
                    if (at >= rows || k >= columns) continue;
                    const u32 first = a[group][odd * 2 + row], second = f[group >> 1][(group & 1) * 4 + odd * 2 + row];
                    const i64 place = (i64)at * columns + k;
                    of_gemm[place] = (high ? high_half(first) : low_half(first)) * gemm::HalfScales<F>::UNDO;
                    of_batch[place] = (high ? high_half(second) : low_half(second)) * post.x;
                }
            }
}
"""

HALVES_OF_TYPE = """
extern "C" void halves_{name}(const u8* data, float* of_gemm, float* of_batch, int rows, int columns) {{
    halves<{name}>(data, of_gemm, of_batch, rows, columns);
}}
"""

PER_TYPE = """
#define FORMAT {name}
namespace of_{name} {{
{kernels}
}}
extern "C" void run_{name}(const u8* raw, u8* data, float* dequantized, float* embedded, float* multiplied, int rows,
                           int columns, i64 row_bytes, int chunks, const int* ids) {{
    const int tiles = (rows + 15) / 16;
    launch(2, 1, 64, [&] {{
        of_{name}::repack_{name}(raw, nullptr, data, nullptr, rows, columns, row_bytes, chunks, (i64)tiles * chunks);
    }});
    launch(chunks, tiles, 256, [&] {{
        of_{name}::dequant_float_{name}(data, nullptr, dequantized, 0, rows, columns, chunks, 0);
    }});
    launch(rows, (columns + 511) / 512, 128, [&] {{
        of_{name}::embed_{name}(data, nullptr, rows, columns, ids, embedded, columns, 1.0f);
    }});
    operands<{name}>(data, multiplied, rows, columns);
}}
#undef FORMAT
"""


def kernel(name: str) -> str:
    return kernel_files()[name].read_text(encoding="utf-8")


def between(text: str, first: str, last: str | None = None) -> str:
    start = text.index(first)
    return text[start : text.index(last, start) if last else None]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """All kernels of all types as one shared library."""
    formats = kernel_source(("formats.cuh", "formats_coded.cuh"), {type.name: type.name for type in TYPES})
    grids = formats[formats.index("template <class F> struct GridOf") : formats.index('#line 1 "common.cuh"')]
    source = '#include "cuda_on_host.h"\n' + grids + formats[formats.index('#line 1 "formats.cuh"') :]
    packing = kernel("repack.cu")
    source += between(packing, "template <class F, bool SCALED", "#ifdef FORMAT")
    source += between(kernel("matvec_tile.cuh"), "// ---- weights of one sub-block", "// ---- grids") + DRIVER
    source += between(kernel("half_pairs.cuh"), "// ---- without instructions")
    source += "namespace gemm {" + between(kernel("gemm_unpack.cuh"), "// Small numbers as halfs") + "}"
    source += "namespace batch {" + between(kernel("formats_half.cuh"), "constexpr int POST_BITS") + "}" + HALVES
    source += "".join(HALVES_OF_TYPE.format(name=type.name) for type in BYTES)
    kernels = (
        between(packing, "#ifdef FORMAT", "#endif").removeprefix("#ifdef FORMAT")
        + kernel("dequant.cu")
        + kernel("embed.cu")
    )
    for type in TYPES:
        source += PER_TYPE.format(name=type.name, kernels=kernels)
    return host_library(tmp_path_factory.mktemp("host"), source)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
@pytest.mark.parametrize("rows", [16, 21])
def test_every_way_to_the_weights_gives_the_bits_of_numpy(library, type, rows):
    columns = 768 if type.block_size == 256 else 7 * max(type.block_size, 32)
    rng = np.random.default_rng(type.value)
    raw = rng.integers(0, 256, (rows, row_bytes(type, columns)), dtype=np.uint8)
    data = np.full(packed_bytes(type, rows, columns) + 16, 0xA5, np.uint8)
    results = np.full((3, rows, columns), np.nan, np.float32)
    ids = np.arange(rows, dtype=np.int32)[::-1].copy()
    getattr(library, f"run_{type.name}")(
        address(raw), address(data), *map(address, results), rows, columns, ctypes.c_longlong(raw.shape[1]),
        LAYOUTS[type].chunks(columns), address(ids),
    )  # fmt: skip
    assert (data[-16:] == 0xA5).all()
    truth = dequantize(raw, type)
    number = np.isfinite(truth)  # of scales that are none, every weight is none
    assert number.mean() > 0.5
    for found in (results[0], results[1, ::-1], results[2]):
        np.testing.assert_array_equal(found[number].view(np.uint32), truth[number].view(np.uint32))
        assert not np.isfinite(found[~number]).any()


@pytest.mark.parametrize("type", BYTES, ids=lambda type: type.name)
def test_halves_are_the_weights_rounded(library, type):
    """The scale and its product with the number are rounded: 2^-11 each, and what is smaller than a half can hold."""
    rows, columns = 21, 768 if type.block_size == 256 else 7 * max(type.block_size, 32)
    raw = random_blocks((rows, columns), type, std=0.05, seed=type.value)
    data, unpacked = np.zeros(packed_bytes(type, rows, columns), np.uint8), np.zeros((3, rows, columns), np.float32)
    getattr(library, f"run_{type.name}")(
        address(raw), address(data), *map(address, unpacked), rows, columns, ctypes.c_longlong(raw.shape[1]),
        LAYOUTS[type].chunks(columns), address(np.zeros(rows, np.int32)),
    )  # fmt: skip
    found = np.full((2, rows, columns), np.nan, np.float32)
    getattr(library, f"halves_{type.name}")(address(data), *map(address, found), rows, columns)
    truth = dequantize(raw, type)
    for halves in found:
        np.testing.assert_allclose(halves, truth, rtol=2.0**-10, atol=2.0**-24)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_every_byte_of_a_chunk_is_written(library, type):
    """What memory held before does not show, also where the last tile has no rows."""
    columns, rows = LAYOUTS[type].chunk_columns, 3
    raw = np.random.default_rng(1).integers(0, 256, (rows, row_bytes(type, columns)), dtype=np.uint8)
    ids, results = np.zeros(rows, np.int32), np.zeros((3, rows, columns), np.float32)
    packings = []
    for before in (0x00, 0xFF):
        packings.append(np.full(packed_bytes(type, rows, columns), before, np.uint8))
        getattr(library, f"run_{type.name}")(
            address(raw), address(packings[-1]), *map(address, results), rows, columns,
            ctypes.c_longlong(raw.shape[1]), 1, address(ids),
        )  # fmt: skip
    np.testing.assert_array_equal(*packings)


def places(folder: str, type: GGMLType) -> dict[str, list[str]]:
    """By file, the lines of code that name a type of matrices; what attention reads are formats of the cache."""
    found = {}
    for path in sorted((Path(__file__).parents[3] / folder).rglob("*.*")):
        if path.suffix not in (".py", ".cu", ".cuh") or "attention" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        comments = r'"""[\s\S]*?"""|#.*' if path.suffix == ".py" else "//.*"
        code = re.sub(comments, "", text)
        lines = [line.strip() for line in code.splitlines() if re.search(rf"(?<!KvType\.)\b{type.name}\b", line)]
        if lines:
            found[path.name] = lines
    return found


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_a_format_is_written_once_per_device(type):
    """Other files may only make a faster form of a template that serves every format, or say that they lack a type."""
    gpu, cpu = places("engine/cuda", type), places("engine/cpu/kernels", type)
    cpu.pop("elementwise.py", None)  # writes the cache
    assert gpu.pop("layouts.py")
    written = [name for name in ("formats.cuh", "formats_coded.cuh") if gpu.pop(name, None)]
    assert len(written) == 1
    gpu.pop("grid_tables.py", None)
    for name in ("formats_half.cuh", "gemm_unpack.cuh", "moe_rows_columns.cuh"):
        assert all(
            re.match(r"template <> struct|struct HalfScales<|const Scales raw = Q6_K", line)
            for line in gpu.pop(name, [])
        )
    assert gpu.keys() <= ({"decode_gemm_plan.py"} if type is GGMLType.Q2_K else set())
    names = ("panel_formats.py", "grid_panels.py", "low_bit_panels.py", "wide_panels.py")
    panels = [cpu.pop(name, None) for name in names]
    assert sum(lines is not None for lines in panels) <= 1  # the copy for products in integers
    assert len(cpu) == 1
