"""Which kernels multiply, by what a row is and how many there are. Must not know of models."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Card(NamedTuple):
    """What a plan must know of a GPU: compute capability (90 = 9.0) and number of multiprocessors."""

    arch: int
    multiprocessors: int


class Phase(Enum):
    """What a row is. Bits of a row depend on its phase, so a token is always computed in the same one."""

    DECODE = "decode"  # the newest token of a sequence; row b is slot b
    PROMPT = "prompt"  # a token of a prompt


class Family(Enum):
    """A set of kernels that multiplies."""

    MATVEC = "matvec"  # matrix/matvec.py: up to 8 rows a launch
    DECODE_GEMM = "decode_gemm"  # matrix/decode_gemm.py: up to 64 rows a launch, Hopper
    STEP_GEMM = "step_gemm"  # matrix/gemm.py: decode steps of more than 64 rows, Hopper
    FLOAT_GEMM = "float_gemm"  # matrix/float_gemm.py: float32 matrices, any number of rows
    PREFILL_GEMM = "prefill_gemm"  # matrix/gemm.py: any number of rows, Hopper
    DENSE = "dense"  # matrix/dense.py: expanded tile by tile, then cuBLAS
    ROUTER = "router"  # experts/router.py: scores of an unquantized router
    HEADS = "heads"  # experts/heads.py: every head's matrix in one launch
    EXPERTS_CHOSEN = "experts_chosen"  # experts/moe.py: each row reads the experts that it chose
    EXPERTS_SHARED = "experts_shared"  # experts/moe_rows.py: rows that chose the same expert read it together, Hopper
    EXPERTS_GROUPED = "experts_grouped"  # experts/prefill.py: rows are sorted by expert, Hopper
    EXPERTS_EVERY = "experts_every"  # every expert multiplies all rows, as products of its own


READ_OPERANDS = frozenset({Family.STEP_GEMM, Family.PREFILL_GEMM})
"""Families of matrix/gemm.py, which read their rows as a gemm.Operand."""


class Split(Enum):
    """How the cards of a tensor-parallel group would share a product. One card computes everything: NONE.

    Weights of a split product would be uploaded in part. After a product with COLUMNS the partial sums of all cards are
    added: Step.product() lists an all-reduce there, before anything reads the residual stream.
    """

    NONE = "none"
    ROWS = "rows"  # a card computes some outputs: q, k and v, gate and up, the head
    COLUMNS = "columns"  # a card reads some inputs and gives a part of every sum: attn_output, ffn_down


@dataclass(frozen=True)
class Families:
    """The family of every step.

    Attributes:
        prompt: of prompt rows, whatever their number; None where prompts do not use the product.
        decode: (first number of rows, family) of decode steps, ascending from 1; () where they do not use it.
    """

    prompt: Family | None
    decode: tuple[tuple[int, Family], ...] = ()

    def family_for(self, n_rows: int, phase: Phase = Phase.DECODE) -> Family:
        """The family that multiplies so many rows."""
        if phase is Phase.PROMPT:
            assert self.prompt is not None, "prompts do not use this product"
            return self.prompt
        return next(family for first, family in reversed(self.decode) if n_rows >= first)

    @property
    def used(self) -> frozenset[Family]:
        """Every family that some step takes."""
        return frozenset(family for _, family in self.decode) | ({self.prompt} if self.prompt else frozenset())
