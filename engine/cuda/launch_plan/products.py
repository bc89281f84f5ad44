"""Products: which matrices one launch multiplies, and the kernels that do it. Must not know of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from engine.concurrency.lazy import lazy
from engine.cuda.formats.layouts import kept_as, packed_bytes
from engine.cuda.launch_plan.families import Card, Families, Family, Phase, Split
from engine.cuda.matrix import decode_gemm_plan, float_gemm, gemm_plan
from engine.cuda.matrix.matvec_plan import BATCH_ROWS, MAX_MATRICES, QUANTIZED_BATCH_ROWS, UNQUANTIZED
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.types import GGMLType
from engine.model.weights import ExpertLinear, Linear, Weight

STEP_GEMM_ROWS = decode_gemm_plan.MAX_ROWS + 1
"""From so many sequences on, decode steps read weights once for all rows, unless bits must not depend on the number:
DECODE_GEMM reads them once per 64 rows. 8B Q4_K_M on an H200, milliseconds a step of 128 and 256 rows: 6.2 and 10.2 in
place of 8.0 and 15.9."""


@dataclass(frozen=True)
class Matrix:
    """A packed matrix on the device, or a stack of equal ones below each other.

    Attributes:
        tensor: name in the file, with the rows where it is a range of them (engine.model.weights.Weight.name).
        type: tensor type on the device. rows: outputs N of one matrix. columns: K.
        partner: name of `up` where the matrix is paired: gate and up are interleaved, N outputs each.
        count: matrices of a stack.
        behind: a tensor whose numbers follow those of `tensor`, and one for the partner: more rows of a matrix, more
            matrices of a stack, of which it has the rows below each other or the columns side by side.
    """

    tensor: str
    type: GGMLType
    rows: int
    columns: int
    partner: str | None = None
    count: int = 1
    behind: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, weight: Weight, partner: Weight | None = None, *, stacked: bool = False, behind: Sequence[Weight] = ()
    ) -> Matrix:
        """The matrix of a tensor; of a stack of them one, or with `stacked` all. behind: see Matrix."""
        name, rows = None if partner is None else partner.name, weight.rows
        count = weight.shape[0] if stacked else 1
        for more in behind[:1]:
            if stacked:
                count += more.rows * more.columns // (weight.rows * weight.columns)
            else:
                rows += more.rows
        names = tuple(more.name for more in behind)
        return cls(weight.name, kept_as(weight.type), rows, weight.columns, name, count, names)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all that it is made of."""
        return (self.tensor, *((self.partner,) if self.partner else ()), *self.behind)

    @property
    def n_bytes(self) -> int:
        """Packed size."""
        return packed_bytes(self.type, self.count * self.rows, self.columns, paired=self.partner is not None)


@dataclass(frozen=True)
class Product:
    """alpha * (W x + bias) for matrices that share their input; with a paired matrix f(gate) * up.

    Attributes:
        matrices: 1 to 4; their outputs follow each other.
        families: the kernels.
        cut: how DECODE_GEMM cuts it into blocks; None without that family.
        activation: f. bias: whether there is one. alpha: factor of the result.
        column: first output column in the projection.
        split: see Split.
    """

    matrices: tuple[Matrix, ...]
    families: Families
    cut: decode_gemm_plan.Cut | None = None
    activation: KernelActivation = KernelActivation.NONE
    bias: bool = False
    alpha: float = 1.0
    column: int = 0
    split: Split = Split.NONE

    @lazy
    def types(self) -> tuple[GGMLType, ...]:
        """Tensor types of the matrices."""
        return tuple(matrix.type for matrix in self.matrices)

    @lazy
    def width(self) -> int:
        """Outputs of all matrices."""
        return sum(matrix.rows for matrix in self.matrices)

    @property
    def columns(self) -> int:
        """K."""
        return self.matrices[0].columns

    @property
    def paired(self) -> bool:
        """Whether gate and up are one matrix."""
        return self.matrices[0].partner is not None

    def family_for(self, n_rows: int, phase: Phase = Phase.DECODE) -> Family:
        """See Families."""
        return self.families.family_for(n_rows, phase)

    @lazy
    def emits(self) -> bool:
        """Whether DECODE_GEMM can leave the result as the operand of a later product."""
        return self.cut is not None and decode_gemm_plan.emits(self.types, self.cut, paired=self.paired)

    def emits_halves(self, multiprocessors: int) -> bool:
        """Whether DECODE_GEMM can leave the result as such an operand by halves, where no norm comes between."""
        if self.cut is None:
            return False
        rows = self.matrices[0].rows
        return decode_gemm_plan.emits_halves(self.types, rows, self.cut, multiprocessors, paired=self.paired)

    @lazy
    def takes_operand(self) -> bool:
        """Whether an operand left by an earlier product can be its input."""
        return self.cut is not None


@dataclass(frozen=True)
class Projection:
    """One or several linear maps of the same input, outputs side by side; a launch for each part.

    Attributes:
        parts: products. width: output columns. columns: input columns.
    """

    parts: tuple[Product, ...]
    width: int
    columns: int

    @property
    def emits(self) -> bool:
        """Whether it can leave its result as an operand."""
        return len(self.parts) == 1 and self.parts[0].emits

    @property
    def takes_operand(self) -> bool:
        """Whether every part can read an operand left for it."""
        return all(part.takes_operand for part in self.parts)


@dataclass(frozen=True)
class Chooser:
    """Chooses kernels for a card.

    Attributes:
        card: the card.
        deterministic: a row's bits depend on its own sequence alone, also where that costs speed.
    """

    card: Card
    deterministic: bool

    def product(
        self,
        matrices: Sequence[Matrix],
        *,
        decodes: bool = True,
        apart: bool = False,
        activation: KernelActivation = KernelActivation.NONE,
        bias: bool = False,
        alpha: float = 1.0,
        column: int = 0,
    ) -> Product:
        """A product of matrices with the same input.

        Args:
            matrices: the matrices.
            decodes: decode steps use it; else only prompts do.
            apart: gate and up of a paired matrix are needed apart, which only FLOAT_GEMM and DENSE give.
            activation: see Product, likewise the others.
            bias: see Product.
            alpha: see Product.
            column: see Product.
        """
        types, columns, paired = [one.type for one in matrices], matrices[0].columns, matrices[0].partner is not None
        floats = float_gemm.supports(types, self.card.arch)
        fused = self.card.arch == gemm_plan.ARCH and all(gemm_plan.supports(type) for type in types) and not apart
        decode: list[tuple[int, Family]] = []
        cut = None
        if decodes:
            few = BATCH_ROWS if UNQUANTIZED.intersection(types) else QUANTIZED_BATCH_ROWS
            many = 1 if self.deterministic else few
            if decode_gemm_plan.supported(types, self.card.arch):
                shapes = [(one.type, one.rows) for one in matrices]
                cut = decode_gemm_plan.group_cut(shapes, columns, self.card.multiprocessors, paired=paired)
                decode = [(many, Family.DECODE_GEMM)]
            if cut is None or many > 1:
                decode = [(1, Family.MATVEC), *decode]
            if fused and not self.deterministic:
                decode.append((STEP_GEMM_ROWS, Family.STEP_GEMM))
            # Elsewhere a row's bits are the same for any number of rows.
            if floats and not paired and not self.deterministic and self.card.arch == gemm_plan.ARCH:
                decode.append((BATCH_ROWS, Family.FLOAT_GEMM))
        prompt = Family.FLOAT_GEMM if floats else Family.PREFILL_GEMM if fused else Family.DENSE
        families = Families(prompt, tuple(decode))
        return Product(tuple(matrices), families, cut, activation, bias, alpha, column)

    def projection(self, linears: Sequence[Linear], *, factor: float = 1.0, decodes: bool = True) -> Projection:
        """Linear maps of one input as few launches as their scales allow; results are multiplied by factor."""
        together = all(linear.scale == 1.0 for linear in linears)
        groups = [list(linears)] if together else [[linear] for linear in linears]
        return self._in_groups(groups, factor=factor, decodes=decodes)

    def with_rows(self, linear: Linear, more: Linear) -> Projection:
        """A linear map and more outputs of the same input, as one matrix; neither has a bias or a factor."""
        matrix = Matrix.of(linear.weight, behind=[more.weight])
        return Projection((self.product([matrix]),), matrix.rows, matrix.columns)

    def side_by_side(self, linears: Sequence[Linear]) -> Projection:
        """As projection(), but a matrix that few kernels multiply does not decide for the others: it goes apart."""
        groups: list[list[Linear]] = []
        for _, run in groupby(linears, lambda linear: (linear.scale, self._multiplied(linear))):
            alike = list(run)
            most = MAX_MATRICES if alike[0].scale == 1.0 else 1
            groups += [alike[i : i + most] for i in range(0, len(alike), most)]
        return self._in_groups(groups, factor=1.0, decodes=True)

    def _multiplied(self, linear: Linear) -> tuple[bool, bool]:
        """Which families of many rows multiply a matrix."""
        kept = kept_as(linear.weight.type)
        return gemm_plan.supports(kept), decode_gemm_plan.supported([kept], self.card.arch)

    def _in_groups(self, groups: Sequence[Sequence[Linear]], *, factor: float, decodes: bool) -> Projection:
        """A launch for each group, results side by side."""
        parts: list[Product] = []
        column = 0
        for group in groups:
            matrices = [Matrix.of(linear.weight) for linear in group]
            bias, alpha = any(linear.bias is not None for linear in group), group[0].scale * factor
            parts.append(self.product(matrices, decodes=decodes, bias=bias, alpha=alpha, column=column))
            column += parts[-1].width
        return Projection(tuple(parts), column, groups[0][0].weight.columns)

    def one_of(self, stack: ExpertLinear, *, decodes: bool = True, bias: bool = False) -> Projection:
        """Any one matrix of a stack."""
        product = self.product([Matrix.of(stack.weight)], decodes=decodes, bias=bias)
        return Projection((product,), product.width, product.columns)
