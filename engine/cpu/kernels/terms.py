"""What one step of a product in floats multiplies: some columns of a row of weights and of a row of activations.

The loops around it (products.py, blocked.py) add steps up in 16 sums, in the order of emit.LANES. Knows no loops.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from engine.cpu.kernels.emit import F32, LANES, Emitter, Value, vector
from engine.cpu.kernels.formats.decoders import DECODERS, Decoder
from engine.cpu.kernels.isa import call
from engine.cpu.kernels.processor import enabled, is_amd, target

PAIRS = "BF16/PAIRS"
"""Name, in the place of a type, of products of BF16 weights with activations rounded to BF16."""

PAIR_COLUMNS = 2 * LANES
"""Columns of a step of them."""


class _Brain(ir.types._BaseFloatType):  # type: ignore[misc]
    """The type bfloat of LLVM, made as llvmlite makes its types of floats."""

    null, intrinsic_name = "0.0", "bf16"

    def __str__(self) -> str:
        return "bfloat"


_Brain._create_instance()


@dataclass(frozen=True)
class Terms:
    """Weights as their decoder gives them, in float32, times 16 activations.

    Attributes:
        decoder: how a block of weights is read; it yields the weights of one step after the other.
        columns: of a step.
        prepared_bytes: of a prepared activation.
    """

    decoder: Decoder
    columns: int = LANES
    prepared_bytes: int = 4

    def activations(self, e: Emitter, address: Value, offset: int = 0) -> Value:
        """A step's activations, float32 at address + offset bytes."""
        return e.load(address, vector(F32), offset, align=4)

    def prepared(self, e: Emitter, address: Value) -> Value:
        """The same, of activations that were prepared for many products."""
        return self.activations(e, address)

    def add(self, e: Emitter, total: Value, weights: Value, activations: Value) -> Value:
        """The 16 sums after one more step."""
        return e.multiply_add(weights, activations, total)


class Pairs(Terms):
    """32 weights of BF16 as they are, times 32 activations rounded to BF16 (VDPBF16PS).

    Sum j of 16 takes columns 2 j and 2 j + 1 of a step, one after the other. Twice as many products an instruction as
    in float32; activations keep 8 of their 24 bits, and numbers below 1.2e-38 count as 0.
    """

    def activations(self, e: Emitter, address: Value, offset: int = 0) -> Value:
        """See Terms.activations: rounded to nearest, ties to even."""
        low, high = (super(Pairs, self).activations(e, address, offset + part) for part in (0, 4 * LANES))
        return call(e, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _pairs(), high, low)

    def prepared(self, e: Emitter, address: Value) -> Value:
        """See Terms.prepared: rounded by the kernel round_rows."""
        return e.load(address, _pairs(), align=4)

    def add(self, e: Emitter, total: Value, weights: Value, activations: Value) -> Value:
        """See Terms.add."""
        return call(e, "llvm.x86.avx512bf16.dpbf16ps.512", vector(F32), total, weights, activations)


def terms_of(name: str) -> Terms:
    """The terms of a product, by a type of weights or PAIRS."""
    if name != PAIRS:
        return Terms(DECODERS[name])
    decoder = Decoder(PAIR_COLUMNS, 2 * PAIR_COLUMNS, lambda e, block: iter([e.load(block, _pairs())]))
    return Pairs(decoder, PAIR_COLUMNS, 2)


def multiplies_pairs() -> bool:
    """Whether numba compiles for a processor with VDPBF16PS."""
    return "avx512bf16" in enabled(target()[2])


def has_pairs() -> bool:
    """Whether BF16 weights are multiplied in pairs: where VDPBF16PS is fast, on AMD's processors.

    On Intel's Emerald Rapids it takes 4.4 times as long as VPDPWSSD, and prompts in integers are 2.3 times as fast.
    """
    return multiplies_pairs() and is_amd()


def _pairs() -> Any:
    return vector(_Brain(), PAIR_COLUMNS)
