"""Integer products on ARM processors, which QEMU emulates: the bits of this machine's kernels."""

import numpy as np
import pytest

from engine.cpu.kernels import processor
from engine.cpu.products.integer import IntegerWeights, n_items
from engine.cpu.products.matmul import prepare
from engine.cpu.threads import ThreadPool
from tests.support import arm
from tests.support.integer_products import form_of, llvm_of, packed, product, quantized

HOST = processor.host()

pytestmark = pytest.mark.skipif(not arm.PRESENT, reason=f"needs {arm.LINKER} and {arm.EMULATOR}")

TILES = [(name, 8, "tile_panels") for name in ("Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "NVFP4")]
KERNELS = [
    *((*each, "i8mm") for each in TILES),
    *((*each, "neon") for each in (*TILES, ("Q4_K", 8, "dot_panels"), ("Q6_K", 16, "tile_panels"))),
    *((*each, "portable") for each in TILES[:2]),
]


@pytest.fixture(scope="module")
def weights():
    with ThreadPool(1) as pool:
        yield {bits: IntegerWeights(pool, bits) for bits in (8, 16)}


@pytest.mark.parametrize(("name", "bits", "kind", "instructions"), KERNELS)
def test_products(name, bits, kind, instructions, weights, tmp_path):
    w, _ = packed(name, 19, 512)
    x = np.random.default_rng(1).standard_normal((6, 512)).astype(np.float32)
    expected = product(weights[bits], w, quantized(x, form_of(bits, HOST, kind, name))[0], kind, HOST)
    blocks, _ = quantized(x, form_of(bits, instructions, kind, name))
    prepared, out = prepare(w), np.zeros_like(expected)
    operands = list(weights[bits].operands(blocks, prepared, out))
    operands[0], operands[4], operands[7] = w.raw, blocks, out  # in the place of their addresses
    source = llvm_of(kind, "/".join((name, instructions, *(("16",) if bits == 16 else ()), "rows")))
    got = arm.run(source, instructions, operands, n_items(kind, prepared), out, tmp_path)
    np.testing.assert_array_equal(got, expected)
