"""Integer products in tests: random weights and activations with their float64 values, kernels and their LLVM code."""

import gguf
import numpy as np
import pytest
from numba import njit, types

from engine.cpu.kernels import build
from engine.cpu.kernels.build import kernel
from engine.cpu.kernels.integer.activations import Form
from engine.cpu.kernels.integer.panels import PANELS
from engine.cpu.memory import array_address
from engine.cpu.products import integer
from engine.cpu.products.integer import empty_activations, n_items, quantize_operands
from engine.cpu.products.matmul import prepare
from engine.gguf.quants import GGMLType
from engine.model.weights import Weight
from tests.support import block_references
from tests.support.weights import SCALES


def packed(name, rows, columns):
    """Random rows of a format: (Weight, their float64 values by the gguf package)."""
    rng = np.random.default_rng(rows * 1000 + columns)
    panel = PANELS[name]
    if panel.wide:
        return halves(rng, rows, columns, GGMLType[name])
    raw = rng.integers(0, 256, (rows * columns // panel.block_size, panel.type_size), dtype=np.uint8)
    for offset in SCALES[name]:
        scales = rng.standard_normal(len(raw)).astype(np.float16)
        raw[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    if name == "MXFP4":
        raw[:, 0] = rng.integers(110, 130, len(raw))
        raw[:3, 0] = (0, 1, 2)[: len(raw)]  # scales that are subnormal numbers, and the first that is not
    if name == "NVFP4":
        raw[0, :4] = (0, 5, 0x7F, 0xFF)  # scales of zero, a subnormal one, and what is no number
    if name == "IQ1_M":
        raw[:, 49:56:2] &= 0x0F  # the upper four bits of 16 are a float16
        for place, byte in zip(range(49, 57, 2), (0x90, 0x70, 0xB0, 0x30), strict=True):
            raw[:, place] |= byte
    raw = raw.reshape(rows, -1)
    if GGMLType[name] in block_references.TYPES:
        truth = block_references.decode(raw, GGMLType[name])
    else:
        truth = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    return Weight("test", GGMLType[name], (rows, columns), raw), truth.reshape(rows, columns).astype(np.float64)


def halves(rng, rows, columns, kind):
    """F16 or BF16 weights of all sizes, and as the numbers of 14 bits that a block of 64 has of them."""
    w = rng.standard_normal((rows, columns // 64, 64)) * 2.0 ** rng.integers(-24, 14, (rows, columns // 64, 1))
    w[0, 0] = 0
    w[-1, -1, 3:7] = (65504, -65504, 6e-8, -1 / 3)
    exact = 4
    if kind is GGMLType.BF16:
        raw, exact = (w.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), 32
        w = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        w = w.astype(np.float16)
        raw = w.view(np.uint16)
    top = np.abs(w.astype(np.float64)).max(-1, keepdims=True)
    step = 2.0 ** (np.floor(np.log2(np.where(top > 0, top, 1))) - 12)
    truth = np.rint(w.astype(np.float64) / step) * step
    large = np.abs(w) >= top / exact
    np.testing.assert_array_equal(truth[large], w[large])
    raw = raw.reshape(rows, columns).view(np.uint8)
    return Weight("test", kind, (rows, columns), raw), truth.reshape(rows, columns)


def form_of(bits, instructions, kind, name):
    """The form of activations that a kernel reads."""
    return integer.form_of(GGMLType[name], bits, kind, instructions)


def quantized(x, form=Form.BYTES):
    """Blocks of activations, and their float64 values."""
    out = empty_activations(*x.shape, form)
    operands = np.array(quantize_operands(x, out, form), dtype=np.int64)
    kernel("quantize")(array_address(operands), 0, out.shape[0] * out.shape[1], 0)
    return out, (integers(out, form) * floats(out, form, 0)).reshape(x.shape)


def integers(blocks, form):
    """The numbers q (T, K / 32, 32) of blocks of activations."""
    if form is Form.BYTES:
        return blocks[:, :, :32].view(np.int8).astype(np.int64)
    if form is Form.BIASED:
        return blocks[:, :, :32].astype(np.int64) - 128
    if form is Form.SPLIT:
        halves = blocks[:, :, :64].view(np.int8).astype(np.int64)
        return 256 * halves[:, :, :32] + halves[:, :, 32:]
    pairs = blocks[:, :, :64].copy().view(np.int16).astype(np.int64)
    if form is Form.SHORT:
        return pairs
    return pairs.reshape(*pairs.shape[:2], 8, 2, 2).swapaxes(-1, -2).reshape(pairs.shape)


def floats(blocks, form, first, count=1, kind=np.float32):
    """Numbers of four bytes behind the q of blocks, as float64 (T, K / 32, count)."""
    start = (32 if form.bits == 8 else 64) + 4 * first
    return blocks[:, :, start : start + 4 * count].copy().view(kind).astype(np.float64)


def product(weights, w, x, kind, instructions, n_tokens=None, **settings):
    """The kernel `kind` on the whole matrix."""
    x = x[:n_tokens]
    prepared = prepare(w)
    out = np.full((len(x), prepared.rows), np.nan, np.float32)
    operands = np.array(weights.operands(x, prepared, out, **settings), dtype=np.int64)
    type_name = weights.kernel_type(prepared).replace(integer.instructions(), instructions)
    kernel(kind, type_name)(array_address(operands), 0, n_items(kind, prepared), 0)
    return out


def llvm_of(kind, type_name):
    """The kernel before it is optimized for this machine: some instruction sets cannot be compiled for it."""
    from numba.core import codegen

    captured = []
    function = build._MAKERS[kind](f"{type_name}:test")
    function.__name__ = function.__qualname__ = f"{kind}_{type_name.replace('/', '_')}_test"
    original = codegen.CPUCodeLibrary.add_ir_module

    def keep(library, module):
        if function.__name__ not in str(module):  # numba's own, which the first kernel of a process brings
            return original(library, module)
        captured.append(str(module))
        raise Enough

    codegen.CPUCodeLibrary.add_ir_module = keep
    try:
        with pytest.raises(Enough):
            njit(nogil=True)(function).compile(types.void(*build._ARGUMENTS[kind]))
    finally:
        codegen.CPUCodeLibrary.add_ir_module = original
    return captured[0]


class Enough(Exception):
    """The module has been seen."""
