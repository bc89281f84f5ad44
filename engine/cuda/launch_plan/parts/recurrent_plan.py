"""What all recurrent layers have in the plan.

Every kind is three bricks: ssm_in, the norm and the products that read it; ssm, what moves the states on; ssm_out, the
last product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from engine.cuda.launch_plan.products import Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Brick, Launch, Norm, Step
from engine.cuda.recurrent.plan import StateShape


@dataclass(frozen=True)
class RecurrentPlan(ABC):
    """A recurrent mixer; one class per class of engine/model/config/recurrent.py that kernels serve.

    Attributes:
        inputs: the products that read the normed input, side by side. None: what moves the states on reads it itself.
        output: the output projection.
        chunked: floats of a token of prompts between kernels that take them in chunks; 0: token after token.
    """

    inputs: Projection | None
    output: Projection
    chunked: int

    @property
    @abstractmethod
    def shape(self) -> StateShape:
        """Widths, as the kernels are built for them."""

    @property
    def takes_operand(self) -> bool:
        """Whether the first products read an operand that an earlier layer has left."""
        return self.inputs is not None and self.inputs.takes_operand

    @property
    def mixed_width(self) -> int:
        """Numbers of a row that what moves the states on reads."""
        assert self.inputs is not None
        return self.inputs.width

    @property
    def inner(self) -> tuple[Projection, ...]:
        """Products between the first and the last."""
        return ()

    def products(self) -> Iterator[Product]:
        """All products."""
        if self.inputs is not None:
            yield from self.inputs.parts
        for projection in (*self.inner, self.output):
            yield from projection.parts

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        yield from (matrix for product in self.products() for matrix in product.matrices)

    def widths(self) -> dict[str, int]:
        """What it needs of the activations, by the fields of Widths."""
        return {"mixed": self.mixed_width, "scanned": self.output.columns, "chunked": self.chunked}

    # ---- launches --------------------------------------------------------------------------------------------

    def bricks(self, step: Step, norm: Norm, *, ready: bool) -> Iterator[Brick]:
        """See AttentionPlan.bricks."""
        yield Brick("ssm_in", self._inputs(step, norm, ready=ready))
        yield Brick("ssm", self.moved(step))
        yield Brick("ssm_out", step.product(self.output), added=True)

    def _inputs(self, step: Step, norm: Norm, *, ready: bool) -> Iterator[Launch]:
        if self.inputs is None:
            yield step.part("normalize_pieces")
            return
        yield from step.norm(norm)
        yield from step.product(self.inputs, ready=ready)

    @abstractmethod
    def moved(self, step: Step) -> Iterator[Launch]:
        """The brick ssm."""
