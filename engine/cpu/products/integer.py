"""Products in integers: which weights take part, their repacked copies, and the operands of the kernels.

Quantized weights are multiplied in integers (kernels/integer/), activations of 8 or 16 bits in blocks of 32 columns;
F16 and BF16 weights as numbers of 14 bits, with activations of 14, where others have 8. A weight may have been repacked
into panels of eight rows (kernels/integer/panels.py), which makes decoding about twice as fast and takes as much memory
again as the weights, or up to 1.55 times as much where a format is recoded; without a copy rows are packed block by
block during the product, those of formats with grids and of F16 and BF16 multiplied in float32. In integers the result
has the same bits with a copy and without, and for any number of rows of x and of threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.cpu.kernels import isa, processor
from engine.cpu.kernels.build import kernel
from engine.cpu.kernels.integer.activations import LINES, Form
from engine.cpu.kernels.integer.panels import GROUP, PANELS, padded_rows
from engine.cpu.kernels.integer.rows import PANELS_AT_ONCE
from engine.cpu.kernels.integer.tiles import PANELS_BLOCK
from engine.cpu.kernels.terms import has_pairs
from engine.cpu.memory import Arena, aligned_empty, array_address
from engine.cpu.products.matmul import Epilogue, Float32Array, PreparedWeight, prepare
from engine.errors import InvalidRequestError
from engine.gguf.quants import GGMLType

if TYPE_CHECKING:
    from engine.cpu.threads import ThreadPool
from engine.model.weights import ExpertLinear, Linear, ModelWeights, Weight

Activations = npt.NDArray[np.uint8]
"""(T, K / 32, 64 or 96) uint8: rows of quantized blocks, as kernels/integer/activations.py lays them out."""

ROWS = isa.ROWS


VARIABLE = "GGUF_ENGINE_CPU"
"""Environment variable that forces an instruction set, one of kernels.isa.ISAS."""


@cache
def instructions() -> str:
    """The instruction set in force: the one that the environment forces, else the best that this machine has.

    Raises:
        InvalidRequestError: the environment names one that does not exist or that this machine lacks.
    """
    forced, possible = os.environ.get(VARIABLE), processor.usable(processor.host())
    if forced is None:
        return possible[0]
    if forced not in possible:
        raise InvalidRequestError(f"{VARIABLE} is {forced!r}; possible on this machine: {', '.join(possible)}")
    return forced


def is_integer(type: GGMLType, columns: int, bits: int = 8, *, repack: bool = True) -> bool:
    """Whether rows of a type are multiplied in integers, with a repacked copy or without.

    F16 and BF16 need whole blocks, activations that are rounded anyway (8 bits), and instructions for pairs of 16 bits;
    of BF16 pairs are multiplied as they are where the processor can.
    """
    panel = PANELS.get(GGMLType(type).name)
    if panel is None or (panel.copied and not repack) or (type is GGMLType.BF16 and has_pairs()):
        return False
    pairs = isa.ISAS[instructions()].for_16_bits(tiles=True).columns == 2
    return not panel.wide or (bits == 8 and columns % panel.block_size == 0 and pairs)


def packed_bytes(type: GGMLType, rows: int, columns: int) -> int:
    """Bytes of a matrix as panels."""
    panel = PANELS[GGMLType(type).name]
    return padded_rows(rows) // ROWS * (columns // panel.block_size) * panel.n_bytes


def repacked_bytes(weight: Weight, bits: int) -> int:
    """Bytes of a weight's copy as panels; 0 where it gets none."""
    *stack, rows, columns = weight.shape
    if not is_integer(weight.type, columns, bits):
        return 0
    return math.prod(stack) * packed_bytes(weight.type, rows, columns)


def dot_kind(n_tokens: int) -> str:
    """The kernel for this many rows of x."""
    return "dot_panels" if n_tokens == 1 else "tile_panels"


def form_of(type: GGMLType, bits: int, kind: str, instruction_set: str) -> Form:
    """The form of activations of 8 or 16 bits that the kernel `kind` of an instruction set multiplies with a type."""
    panel, tiles = PANELS[type.name], kind == "tile_panels"
    if panel.wide:
        return Form.SHORT
    if bits == 8:
        biased = tiles and isa.ISAS[instruction_set].for_tiles(panel.largest, halves=panel.has_halves).biased
        return Form.BIASED if biased else Form.BYTES
    return Form.PAIRS if isa.ISAS[instruction_set].for_16_bits(tiles=tiles).columns == 2 else Form.SPLIT


def type_name(type: GGMLType, bits: int, *, repack: bool) -> str:
    """The type of the kernels that multiply weights of a type with activations of 8 or 16 bits."""
    parts = (GGMLType(type).name, instructions(), *(() if bits == 8 else ("16",)), *(() if repack else ("rows",)))
    return "/".join(parts)


def kernel_names(type: GGMLType, bits: int, *, repack: bool) -> list[tuple[str, str]]:
    """Kind and type of the kernels that a type of weights needs."""
    products = [(kind, type_name(type, bits, repack=repack)) for kind in ("dot_panels", "tile_panels")]
    return [("pack_panels", type_name(type, 8, repack=True)), *products] if repack else products


def empty_activations(n_tokens: int, columns: int, form: Form) -> Activations:
    """Room for quantized rows, aligned to cache lines."""
    size = LINES[form.bits].n_bytes
    return aligned_empty(n_tokens, columns // GROUP, size, dtype=np.uint8)


def quantize_operands(x: Float32Array, out: Activations, form: Form) -> tuple[int, ...]:
    """The numbers that the kernel `quantize` reads; its items are the blocks of all rows."""
    return (array_address(x), x.strides[0], out.shape[1], array_address(out), form)


class IntegerWeights:
    """The weights of a model that are multiplied in integers.

    Args:
        pool: threads that repack.
        bits: of activations, 8 or 16.
    """

    def __init__(self, pool: ThreadPool, bits: int) -> None:
        self._pool = pool
        self._bits = bits
        self._places: dict[int, int] = {}
        self._arena = Arena()
        self._copies: list[npt.NDArray[np.uint8]] = []

    @property
    def n_bytes(self) -> int:
        """Bytes of the repacked copies."""
        return sum(copy.nbytes for copy in self._copies)

    def repack(self, weight: Weight) -> None:
        """Makes a copy as panels, of a matrix or of a stack of them; nothing where the type has no panels."""
        if not is_integer(weight.type, weight.shape[-1], self._bits):
            return
        matrices = [weight] if len(weight.shape) == 2 else [weight.expert(index) for index in range(weight.shape[0])]
        size = packed_bytes(weight.type, *matrices[0].shape)
        copy = self._arena.empty(size * len(matrices))
        self._copies.append(copy)
        for index, matrix in enumerate(matrices):
            prepared = prepare(matrix)
            if prepared.address not in self._places:
                self._pack(prepared, array_address(copy) + index * size)

    def takes(self, weight: PreparedWeight) -> bool:
        """Whether a weight is multiplied in integers."""
        return is_integer(weight.type, weight.columns, self._bits, repack=weight.address in self._places)

    def form(self, weight: PreparedWeight, n_tokens: int) -> Form:
        """The form in which this many rows of activations are multiplied with a weight."""
        return form_of(weight.type, self._bits, dot_kind(n_tokens), instructions())

    def kernel_type(self, weight: PreparedWeight) -> str:
        """The type of the kernel that multiplies it."""
        return type_name(weight.type, self._bits, repack=weight.address in self._places)

    def operands(
        self,
        x: Activations,
        weight: PreparedWeight,
        out: Float32Array,
        *,
        scale: float = 1.0,
        bias: Float32Array | None = None,
        residual: Float32Array | None = None,
    ) -> tuple[int, ...]:
        """The numbers that dot_panels and tile_panels read; n_items() says how many items there are."""
        n_blocks = weight.columns // PANELS[weight.type.name].block_size
        packed = (self._places.get(weight.address, weight.address), weight.stride, n_blocks, weight.rows)
        activations = (array_address(x), x.strides[0], len(x))
        epilogue = Epilogue(scale, bias, residual)
        return (*packed, *activations, array_address(out), out.strides[0], *epilogue.operands())

    def _pack(self, weight: PreparedWeight, target: int) -> None:
        pack = kernel("pack_panels", type_name(weight.type, 8, repack=True))
        n_blocks = weight.columns // PANELS[weight.type.name].block_size
        operands = np.array([weight.address, weight.stride, weight.rows, n_blocks, target], dtype=np.int64)
        start, n_panels = array_address(operands), n_panels_of(weight)
        n_tasks = min(4 * self._pool.threads, n_panels)

        def task(index: int, held: Any = operands) -> None:
            pack(start, n_panels * index // n_tasks, n_panels * (index + 1) // n_tasks, 0)

        self._pool.run(task, n_tasks)
        self._places[weight.address] = target


def n_panels_of(weight: PreparedWeight) -> int:
    """Panels of a matrix; the last one may be padded."""
    return padded_rows(weight.rows) // ROWS


def n_items(kind: str, weight: PreparedWeight) -> int:
    """Items of a product by the kernel `kind`."""
    return -(-n_panels_of(weight) // {"dot_panels": PANELS_AT_ONCE, "tile_panels": PANELS_BLOCK}[kind])


def all_matrices(weights: ModelWeights) -> Iterable[Weight]:
    """Every matrix that is multiplied with activations (the embedding table only where it is the output, too)."""
    linears: list[Linear | ExpertLinear | None] = [weights.output]
    if weights.per_layer is not None:
        linears.append(weights.per_layer.model_proj)
    if weights.spread is not None:
        linears += (weights.spread.proj, weights.spread.unembd_proj)
    skips = [weights.head_skip]
    for layer in weights.layers:
        skips += (layer.mixer_skip, layer.ffn_skip)
        recurrent, moe = layer.recurrent, layer.moe
        linears += () if layer.ngrams is None else layer.ngrams.linears()
        if recurrent is not None:
            linears += recurrent.linears()
        if layer.config.attention_part is not None:
            attention = layer.attention
            linears += (attention.q, attention.k, attention.v, attention.gate, attention.output)
            linears += () if attention.indexer is None else attention.indexer.linears()
            linears += () if attention.compressed is None else attention.compressed.linears()
        if layer.channel_mix is not None:
            linears += (layer.channel_mix.key, layer.channel_mix.value, layer.channel_mix.receptance)
        if layer.laurel is not None:
            linears += (layer.laurel.left, layer.laurel.right)
        if layer.layer_input is not None:
            linears += (layer.layer_input.inp_gate, layer.layer_input.proj)
        if layer.streams is not None:
            linears += (layer.streams.router, layer.streams.predict, layer.streams.correct)
        if moe is not None:
            linears += (moe.router, moe.gate, moe.up, moe.down, moe.shared_gate)
            linears += () if moe.latent is None else (moe.latent.down, moe.latent.up)
        for part in (layer.ffn, None if moe is None else moe.shared):
            linears += () if part is None else (part.gate, part.up, part.down)
    for skip in skips:
        linears += () if skip is None else skip.linears()
    return (linear.weight for linear in linears if linear is not None)
