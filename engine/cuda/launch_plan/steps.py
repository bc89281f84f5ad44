"""What a step launches for products and row kernels: names of kernels, and the jobs that build them.

Parts of a layer list their launches through a Step; the launchers of the other rooms make the same decisions with the
same functions. Must not know of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import NamedTuple

from engine.cuda.formats import dequant
from engine.cuda.formats.layouts import tile_count
from engine.cuda.launch_plan.families import READ_OPERANDS, Card, Family, Phase, Split
from engine.cuda.launch_plan.products import Matrix, Product, Projection
from engine.cuda.matrix import decode_gemm_plan, dense_plan, float_gemm, gemm_plan, matvec_plan
from engine.cuda.rows import parts, rows
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.types import GGMLType

Job = tuple[Sequence[str], dict[str, object] | None]
"""Kernel files and defines, for compiler.prebuild."""


class Norm(Enum):
    """Where a normalization is computed."""

    ABSENT = "absent"
    FOLDED = "folded"  # by the products that read its result
    APART = "apart"  # by a row kernel


class Input(Enum):
    """The form in which products find their input."""

    PLAIN = "plain"  # float32 activations
    OPERAND = "operand"  # gemm.Operand
    HALF = "half"  # float16, for cuBLAS
    WIDE = "wide"  # float32, for cuBLAS


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: entry point. job: what builds it; None for calls of libraries.
        family: of a product, else None. tensors: names of the matrices that it reads.
        brick: of the forward pass. layer: number, None outside the layers.
    """

    kernel: str
    job: Job | None
    family: Family | None = None
    tensors: tuple[str, ...] = ()
    brick: str = ""
    layer: int | None = None


class Brick(NamedTuple):
    """A brick of a mixer. added: its last product's result is added to the residual stream."""

    name: str
    launches: Iterator[Launch]
    added: bool = False


@dataclass(frozen=True)
class Step:
    """A decode step or a batch of prompts of so many rows.

    Attributes:
        phase: what the rows are. n_rows: their number. card: the GPU. most_rows: of any decode step of the runner.
        gemm_types: tensor types of all products of gemm.cu of the model, which share kernels.
        gemm_activation: of such products that are not gated: they share the kernels of a gated one.
        fixed_rows: DENSE products multiply whole pieces of rows.
        appends_first: in a decode step, all keys and values are in the cache before any row's attention reads it, as
            several rows may be of one sequence.
        gathered: rows were gathered behind attention: it has left no operand.
    """

    phase: Phase
    n_rows: int
    card: Card
    most_rows: int
    gemm_types: tuple[GGMLType, ...]
    gemm_activation: KernelActivation
    fixed_rows: bool
    appends_first: bool = False
    gathered: bool = False

    @property
    def prompts(self) -> bool:
        """Whether rows are tokens of prompts."""
        return self.phase is Phase.PROMPT

    @property
    def hands_over(self) -> bool:
        """Whether products leave operands for later ones, where both can."""
        few, most = decode_gemm_plan.FEW_ROWS, decode_gemm_plan.MAX_ROWS
        return not self.prompts and few < self.n_rows <= most

    # ---- row kernels -----------------------------------------------------------------------------------------

    def row(self, kernel: str) -> Launch:
        """A kernel of rows.cu."""
        return Launch(kernel, (rows.FILES, None))

    def part(self, kernel: str) -> Launch:
        """A kernel of parts.cu."""
        return Launch(kernel, (parts.FILES, None))

    def norm(self, norm: Norm) -> Iterator[Launch]:
        """A norm in front of products."""
        if norm is Norm.APART:
            yield self.part("normalize_pieces")

    def embed(self, matrix: Matrix) -> Launch:
        """Rows of an embedding table."""
        return Launch(f"embed_{matrix.type.name}", dequant.build_jobs(matrix.type)[0], tensors=(matrix.tensor,))

    # ---- products --------------------------------------------------------------------------------------------

    def product(self, projection: Projection, *, given: Input = Input.PLAIN, ready: bool = False) -> Iterator[Launch]:
        """A projection. given: form of its input. ready: an earlier product has left the operand of DECODE_GEMM."""
        form = given
        for part in projection.parts:
            family = part.family_for(self.n_rows, self.phase)
            if family in READ_OPERANDS:
                if form is not Input.OPERAND:
                    yield self.operand()
                form = Input.OPERAND
                yield from self.gemm(part)
            elif family is Family.FLOAT_GEMM:
                yield self.floats(part)
            elif family is Family.DENSE:
                for matrix in part.matrices:
                    wanted = Input.WIDE if matrix.type is GGMLType.F32 else Input.HALF
                    if form is not wanted:
                        yield self._plain(wanted)
                    form = wanted
                    yield from self._dense(matrix)
                if part.bias:
                    yield self.row("add_bias")
            else:
                yield from self.decode_product(part, family, ready=ready)
        if any(part.split is Split.COLUMNS for part in projection.parts):
            yield Launch("all_reduce", None)

    def decode_product(
        self, part: Product, family: Family, *, ready: bool = False, halves: bool = False
    ) -> Iterator[Launch]:
        """One part of a projection in a decode step. halves: it leaves an operand so, see Product.emits_halves."""
        names = _names(part.matrices)
        if family is Family.DECODE_GEMM:
            assert part.cut is not None
            for batch in decode_gemm_plan.turns(self.n_rows):
                memory = decode_gemm_plan.block_memory(part.types, part.cut, batch, part.columns, ready=ready)
                if not memory.resident and not ready:
                    yield Launch("batch_operand", decode_gemm_plan.operand_job(), family)
                job = decode_gemm_plan.kernel_job(
                    part.types,
                    part.cut,
                    part.columns,
                    batch,
                    paired=part.paired,
                    activation=part.activation,
                    ready=ready,
                    halves=halves,
                )
                yield Launch("batch_matvec", job, family, names)
            return
        assert family is Family.MATVEC
        first = 0
        for count in matvec_plan.runs(part.types):
            group = part.matrices[first : first + count]
            first += count
            tiles, types = sum(tile_count(one.rows, paired=part.paired) for one in group), [one.type for one in group]
            most = matvec_plan.most_sequences(types, tiles, part.columns, self.card)
            for batch in matvec_plan.turns(self.n_rows, most):
                operand = matvec_plan.operand_block(types, tiles, part.columns, batch, self.card)
                if operand is not None:
                    yield Launch("matvec_operand", matvec_plan.operand_job(), family)
                job, _ = matvec_plan.kernel_job(
                    types,
                    tiles,
                    part.columns,
                    batch,
                    self.card,
                    paired=part.paired,
                    activation=part.activation,
                    operand=operand,
                )
                yield Launch("matvec", job, family, _names(group))

    def gated(self, product: Product) -> Iterator[Launch]:
        """Gate and up of many rows with the activation between, from float32 rows."""
        if product.family_for(self.n_rows, self.phase) in READ_OPERANDS:
            yield self.operand()
            yield from self.gemm(product)
            return
        if product.family_for(self.n_rows, self.phase) is Family.FLOAT_GEMM:
            yield self.floats(product)
            return
        (matrix,) = product.matrices
        yield self._plain(Input.WIDE if matrix.type is GGMLType.F32 else Input.HALF)
        yield from self._dense(matrix)

    def gemm(self, part: Product, *, tile: gemm_plan.Tile | None = None) -> Iterator[Launch]:
        """A product of gemm.cu. tile: of experts; else chosen."""
        family = Family.PREFILL_GEMM if self.prompts or tile else Family.STEP_GEMM
        sets = {type: members for members in gemm_plan.family(self.gemm_types) for type in members}
        activation = part.activation if part.paired else self.gemm_activation
        for types, run in groupby(part.matrices, lambda matrix: sets[matrix.type]):
            group = list(run)
            units = sum(-(-tile_count(one.count * one.rows, paired=part.paired) // 4) for one in group)
            shape = tile or gemm_plan.choose_tile(
                units, self.n_rows, part.columns, self.card.multiprocessors, step=not self.prompts
            )
            job = gemm_plan.build_job(types, shape, activation, experts=tile is not None)
            yield Launch("gemm", job, family, _names(group))

    def floats(self, part: Product) -> Launch:
        """A product of float_gemm.cu."""
        tiles = sum(tile_count(one.rows, paired=part.paired) for one in part.matrices)
        shape = float_gemm.choose_shape(tiles, self.n_rows, self.card)
        return Launch(
            shape.kernel, float_gemm.float_job(shape, self.card.arch), Family.FLOAT_GEMM, _names(part.matrices)
        )

    def operand(self) -> Launch:
        """Rows as an operand of gemm.cu."""
        return Launch("operand_half", (gemm_plan.OPERAND_FILES, {}))

    def _plain(self, form: Input) -> Launch:
        return self.row("normalize_half" if form is Input.HALF else "normalize_float")

    def _dense(self, matrix: Matrix) -> Iterator[Launch]:
        paired = matrix.partner is not None
        kernel = f"dequant_{'float' if matrix.type is GGMLType.F32 else 'half'}_{matrix.type.name}"
        pieces = dense_plan.pieces(self.n_rows) if self.fixed_rows else 1
        for _ in dense_plan.expansions(
            matrix.type, matrix.rows, matrix.columns, paired=paired, fixed_rows=self.fixed_rows
        ):
            yield Launch(kernel, dequant.build_jobs(matrix.type)[1], Family.DENSE, _names([matrix]))
            for _ in range(pieces * (2 if paired else 1)):
                yield Launch("cublas", None, Family.DENSE, _names([matrix]))


def _names(matrices: Iterable[Matrix]) -> tuple[str, ...]:
    return tuple(name for one in matrices for name in one.tensors)
