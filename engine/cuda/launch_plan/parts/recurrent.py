"""Recurrent layers in the plan: their products, and the kernels between them that read and write the state.

Letters: S columns of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.cuda.launch_plan.parts.recurrent_plan import RecurrentPlan
from engine.cuda.launch_plan.parts.rwkv import describe_time_mix
from engine.cuda.launch_plan.products import Chooser, Projection
from engine.cuda.launch_plan.steps import Launch, Step
from engine.cuda.recurrent.convolution import ConvShape
from engine.cuda.recurrent.delta import DeltaShape
from engine.cuda.recurrent.lightning import LightningShape
from engine.cuda.recurrent.mamba_2 import Mamba2Shape
from engine.cuda.recurrent.mamba_plan import MambaShape
from engine.cuda.recurrent.plan import CHUNK_ARCH, StateShape
from engine.model.config import (
    DeltaNetConfig,
    KimiDeltaConfig,
    LightningConfig,
    Mamba2Config,
    MambaConfig,
    Plamo2Config,
    RecurrentConfig,
    ShortConvConfig,
    TimeMixConfig,
)
from engine.model.weights import (
    DeltaNetWeights,
    KimiDeltaWeights,
    LightningWeights,
    Linear,
    Mamba2Weights,
    MambaWeights,
    Plamo2Weights,
    RecurrentWeights,
    Rwkv6Weights,
    Rwkv7Weights,
    ShortConvWeights,
)


@dataclass(frozen=True)
class ShortConvPlan(RecurrentPlan):
    """A gated short convolution."""

    conv: ConvShape

    @property
    def shape(self) -> ConvShape:
        """See RecurrentPlan.shape."""
        return self.conv

    def moved(self, step: Step) -> Iterator[Launch]:
        """See RecurrentPlan.moved."""
        (job,) = self.conv.build_jobs()
        yield Launch("conv_prompt" if step.prompts else "conv_decode", job)


@dataclass(frozen=True)
class MambaPlan(RecurrentPlan):
    """The selective state space of Mamba 1; the first product gives u and z.

    Attributes:
        ssm_x: what dt is made of, B and C. ssm_dt: dt, with its bias.
        norms: what ssm_x gives is normalized, each of its parts.
    """

    mamba: MambaShape
    ssm_x: Projection
    ssm_dt: Projection
    norms: bool

    @property
    def shape(self) -> MambaShape:
        """See RecurrentPlan.shape."""
        return self.mamba

    @property
    def inner(self) -> tuple[Projection, ...]:
        """See RecurrentPlan.inner."""
        return self.ssm_x, self.ssm_dt

    def widths(self) -> dict[str, int]:
        """See RecurrentPlan.widths."""
        return super().widths() | {"convolved": self.mamba.d_inner, "between": self.mamba.row_width}

    def moved(self, step: Step) -> Iterator[Launch]:
        """See RecurrentPlan.moved."""
        conv, scan = self.mamba.build_jobs()
        yield Launch("conv_prompt" if step.prompts else "conv_decode", conv)
        yield from step.product(self.ssm_x)
        if self.norms:
            for _ in range(3):
                yield step.part("normalize_pieces")
        yield from step.product(self.ssm_dt)
        yield Launch("scan_prompt" if step.prompts else "scan_decode", scan)


@dataclass(frozen=True)
class Mamba2Plan(RecurrentPlan):
    """The state space of Mamba 2; the first product gives z, the inputs of the convolution, and dt.

    Attributes:
        norm: each group of the result is normalized.
    """

    mamba: Mamba2Shape
    norm: bool

    @property
    def shape(self) -> Mamba2Shape:
        """See RecurrentPlan.shape."""
        return self.mamba

    def widths(self) -> dict[str, int]:
        """See RecurrentPlan.widths."""
        return super().widths() | {"convolved": self.mamba.convolved}

    def moved(self, step: Step) -> Iterator[Launch]:
        """See RecurrentPlan.moved."""
        conv, scan, *chunks = self.mamba.build_jobs()
        if step.prompts:
            yield Launch("conv_prompt", conv)
        if step.prompts and self.chunked:
            yield Launch("mamba_2_chunks", chunks[0])
            yield Launch("mamba_2_walk", chunks[0])
        else:
            yield Launch("mamba_2_prompt" if step.prompts else "mamba_2_decode", scan)
        if self.norm:
            yield step.part("normalize_pieces")


@dataclass(frozen=True)
class DeltaPlan(RecurrentPlan):
    """A gated delta rule. The first products give q, k, v and, with one decay per head, the gate, beta and steps.

    With one decay per key they give q, k, v, what steps and the gate are made of, and beta.

    Attributes:
        steps, gate: products that expand the steps and the gate, of S numbers; None where the first ones give them.
    """

    delta: DeltaShape
    steps: Projection | None = None
    gate: Projection | None = None

    @property
    def shape(self) -> DeltaShape:
        """See RecurrentPlan.shape."""
        return self.delta

    @property
    def inner(self) -> tuple[Projection, ...]:
        """See RecurrentPlan.inner."""
        return tuple(one for one in (self.steps, self.gate) if one is not None)

    def widths(self) -> dict[str, int]:
        """See RecurrentPlan.widths."""
        between = sum(one.width for one in self.inner)
        return super().widths() | {"convolved": self.delta.convolved, "between": between}

    def moved(self, step: Step) -> Iterator[Launch]:
        """See RecurrentPlan.moved."""
        conv, delta, *chunks = self.delta.build_jobs()
        for projection in self.inner:
            yield from step.product(projection)
        if not step.prompts:
            yield Launch("delta_decode", delta)
            return
        yield Launch("conv_prompt", conv)
        if self.chunked:
            yield Launch("delta_chunks", chunks[0])
            yield Launch("delta_walk", chunks[0])
        else:
            yield Launch("delta_prompt", delta)
        yield Launch("delta_finish", delta)


@dataclass(frozen=True)
class LightningPlan(RecurrentPlan):
    """Lightning attention; the first products give q, k and v of each head, then the gates."""

    lightning: LightningShape

    @property
    def shape(self) -> LightningShape:
        """See RecurrentPlan.shape."""
        return self.lightning

    def moved(self, step: Step) -> Iterator[Launch]:
        """See RecurrentPlan.moved."""
        (job,) = self.lightning.build_jobs()
        yield Launch("lightning_prompt" if step.prompts else "lightning_decode", job)
        yield step.part("normalize_pieces")
        yield step.part("multiply_gate")


def describe_recurrent(
    config: RecurrentConfig, weights: RecurrentWeights, chooser: Chooser, *, factor: float
) -> RecurrentPlan:
    """The recurrent mixer of one layer; what it adds to the stream is multiplied by factor."""
    if isinstance(config, TimeMixConfig):
        assert isinstance(weights, (Rwkv6Weights, Rwkv7Weights))
        return describe_time_mix(config, weights, chooser, factor=factor)
    inputs = chooser.side_by_side(recurrent_inputs(weights))
    last = weights.linears()[-1]
    assert isinstance(last, Linear)
    output = chooser.projection([last], factor=factor)
    shape = state_shape(config, inputs.width)
    both = inputs, output, shape.chunk_width if chooser.card.arch >= CHUNK_ARCH else 0
    if isinstance(shape, ConvShape):
        return ShortConvPlan(*both, shape)
    if isinstance(shape, MambaShape):
        if isinstance(weights, Plamo2Weights):
            later = chooser.projection(weights.d_b_c), chooser.projection([weights.each_dt])
            return MambaPlan(*both, shape, *later, norms=True)
        assert isinstance(config, MambaConfig)
        assert isinstance(weights, MambaWeights)
        later = chooser.projection([weights.ssm_x]), chooser.projection([weights.ssm_dt])
        return MambaPlan(*both, shape, *later, norms=config.norm_dt_b_c)
    if isinstance(shape, Mamba2Shape):
        assert isinstance(weights, Mamba2Weights)
        return Mamba2Plan(*both, shape, norm=weights.norm is not None)
    if isinstance(shape, LightningShape):
        return LightningPlan(*both, shape)
    assert isinstance(shape, DeltaShape)
    if isinstance(weights, KimiDeltaWeights):
        low = weights.decay_b, weights.gate_b
        return DeltaPlan(*both, shape, *(None if one is None else chooser.projection([one]) for one in low))
    return DeltaPlan(*both, shape)


def state_shape(config: RecurrentConfig, row: int) -> StateShape:
    """The kernel shape of one layer whose first products give `row` numbers."""
    if isinstance(config, ShortConvConfig):
        return ConvShape(config.inner, config.conv_width, row, gated=True)
    if isinstance(config, (MambaConfig, Plamo2Config)):  # PLaMo 2's channels of a head have one decay and one step
        return MambaShape(config.inner, config.state, config.conv_width, config.dt_rank)
    if isinstance(config, Mamba2Config):
        return Mamba2Shape(config.heads, config.head_width, config.groups, config.state, config.conv_width)
    if isinstance(config, LightningConfig):
        return LightningShape(config.heads, config.head_width, row)
    if isinstance(config, DeltaNetConfig):
        heads, size = (config.heads, config.key_heads), config.head_width
        kind = {"grouped": config.grouped, "key_decays": False, "sigmoid_gate": config.sigmoid_gate}
        return DeltaShape(*heads, size, config.conv_width, row, **kind)
    assert isinstance(config, KimiDeltaConfig)
    heads, size = (config.heads, config.heads), config.head_width
    kind = {"grouped": True, "key_decays": True, "sigmoid_gate": True}
    floor = config.decay_floor or 0.0
    return DeltaShape(*heads, size, config.conv_width, row, **kind, floor=floor, unit_epsilon=config.unit_epsilon)


def recurrent_inputs(weights: RecurrentWeights) -> list[Linear]:
    """What a recurrent mixer multiplies the normed input with, in the order of a row."""
    if isinstance(weights, ShortConvWeights):
        return [weights.in_proj]
    if isinstance(weights, (MambaWeights, Mamba2Weights)):
        return [weights.ssm_in]
    if isinstance(weights, LightningWeights):
        return [weights.qkv, weights.gate]
    if isinstance(weights, Plamo2Weights):
        return [*weights.u_z]
    if isinstance(weights, DeltaNetWeights):
        return [weights.qkv, weights.z, weights.beta, weights.alpha]
    assert isinstance(weights, KimiDeltaWeights)
    return [weights.q, weights.k, weights.v, weights.decay_a, weights.gate_a, weights.beta]
