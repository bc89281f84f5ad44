"""Recurrent layers in the plan: their products, and the kernels between them that read and write the state.

Letters: E channels, N states of a channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.cuda.launch_plan.products import Chooser, Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Launch, Norm, Step
from engine.cuda.recurrent.mamba_plan import MambaShape, build_jobs
from engine.model.recurrent_config import MambaConfig
from engine.model.weights import MambaWeights


@dataclass(frozen=True)
class MambaPlan:
    """The selective state space of one layer; see engine.model.config.MambaConfig.

    Attributes:
        shape: widths, as the kernels are built for them.
        ssm_in: u and z. ssm_x: what dt is made of, B and C. ssm_dt: dt, with its bias.
        output: the output projection.
        norms: what ssm_x gives is normalized, each of its parts.
    """

    shape: MambaShape
    ssm_in: Projection
    ssm_x: Projection
    ssm_dt: Projection
    output: Projection
    norms: bool

    @property
    def takes_operand(self) -> bool:
        """Whether the first product reads an operand that an earlier layer has left."""
        return self.ssm_in.takes_operand

    def products(self) -> Iterator[Product]:
        """All products."""
        for projection in (self.ssm_in, self.ssm_x, self.ssm_dt, self.output):
            yield from projection.parts

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        yield from (matrix for product in self.products() for matrix in product.matrices)

    def widths(self) -> dict[str, int]:
        """What it needs of the activations, by the fields of Widths."""
        return {"inner": self.shape.d_inner, "dt_b_c": self.shape.row_width}

    # ---- launches --------------------------------------------------------------------------------------------

    def bricks(self, step: Step, norm: Norm, *, ready: bool) -> Iterator[tuple[str, Iterator[Launch]]]:
        """See AttentionPlan.bricks."""
        yield "ssm_in", self._inputs(step, norm, ready=ready)
        yield "ssm", self._scanned(step)
        yield "ssm_out", step.product(self.output)

    def _inputs(self, step: Step, norm: Norm, *, ready: bool) -> Iterator[Launch]:
        yield from step.norm(norm)
        yield from step.product(self.ssm_in, ready=ready)

    def _scanned(self, step: Step) -> Iterator[Launch]:
        conv, scan = build_jobs(self.shape)
        yield Launch("conv_prompt" if step.prompts else "conv_decode", conv)
        yield from step.product(self.ssm_x)
        if self.norms:
            for _ in range(3):
                yield step.part("normalize_pieces")
        yield from step.product(self.ssm_dt)
        yield Launch("scan_prompt" if step.prompts else "scan_decode", scan)


def describe_mamba(config: MambaConfig, weights: MambaWeights, chooser: Chooser, *, factor: float) -> MambaPlan:
    """The state space of one layer; what it adds to the stream is multiplied by factor."""
    return MambaPlan(
        shape=mamba_shape(config),
        ssm_in=chooser.projection([weights.ssm_in]),
        ssm_x=chooser.projection([weights.ssm_x]),
        ssm_dt=chooser.projection([weights.ssm_dt]),
        output=chooser.projection([weights.ssm_out], factor=factor),
        norms=config.norm_dt_b_c,
    )


def mamba_shape(config: MambaConfig) -> MambaShape:
    """The kernel shape of one layer's state space."""
    return MambaShape(config.inner, config.state, config.conv_width, config.dt_rank)
