"""Feed-forward parts in the plan: which products they are made of. Letters: D width, F width of the part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.cuda.formats.layouts import kept_as
from engine.cuda.launch_plan.families import READ_OPERANDS, Phase
from engine.cuda.launch_plan.products import Chooser, Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Input, Launch, Step
from engine.cuda.rows.activation import KernelActivation
from engine.cuda.rows.rows import NO_LIMITS, Limits
from engine.model.config import Activation, FfnConfig
from engine.model.weights import ExpertLinear, FfnWeights, Linear

ACTIVATIONS = {
    Activation.SILU: KernelActivation.SILU,
    Activation.GELU: KernelActivation.GELU_TANH,
    Activation.RELU: KernelActivation.RELU,
    Activation.RELU_SQUARED: KernelActivation.RELU_SQUARED,
    Activation.SWIGLU_CLAMPED: KernelActivation.SWIGLU_CLAMPED,
    Activation.XIELU: KernelActivation.XIELU,
    Activation.SITU: KernelActivation.SITU,
}
_OPERAND_COLUMNS = 128  # hidden vectors become an operand of gemm.cu in whole blocks of so many


@dataclass(frozen=True)
class FfnPlan:
    """A feed-forward part.

    Attributes:
        paired: gate and up in one launch; None where biases, scales or types forbid it.
        gate: the gate alone where it is not paired; None in parts without a gate.
        up: the up projection where it is not paired.
        down: the down projection.
        activation: the function between.
        width: F.
        act_scales: the activations are divided.
        gate_bias, up_bias: biases of a paired matrix, which only products of prompts apply.
        limits: see Limits; only where nothing is paired. sub_norm: what the down projection reads is normalized.
        sparsity: see engine.model.config.FfnConfig.
    """

    paired: Product | None
    gate: Projection | None
    up: Projection | None
    down: Projection
    activation: KernelActivation
    width: int
    act_scales: bool = False
    gate_bias: bool = False
    up_bias: bool = False
    limits: Limits = NO_LIMITS
    sub_norm: bool = False
    sparsity: float = 0.0

    def chains(self, n_rows: int, phase: Phase) -> bool:
        """Whether the product of gate and up leaves the hidden vectors as the operand of the down projection."""
        if self.paired is None or self.width % _OPERAND_COLUMNS:
            return False
        return all(part.family_for(n_rows, phase) in READ_OPERANDS for part in (self.paired, *self.down.parts))

    def products(self) -> Iterator[Product]:
        """All products."""
        if self.paired is not None:
            yield self.paired
        for projection in (self.gate, self.up, self.down):
            if projection is not None:
                yield from projection.parts

    def widths(self) -> dict[str, int]:
        """What it needs of the activations, by the fields of Widths."""
        return {"ffn": self.width}

    def hidden(self, step: Step, *, ready: bool = False, leaves: bool = False) -> Iterator[Launch]:
        """Launches of gate, up and activation. ready: see Step.product. leaves: they leave the operand of down."""
        if self.paired is None:
            assert self.up is not None
            for projection in (self.gate, self.up):
                if projection is not None:
                    yield from step.product(projection)
            if self.sparsity:
                yield step.part("thin_out")
            yield step.row("gate")
            if self.act_scales:
                yield step.part("divide")
            if self.sub_norm:
                yield step.part("normalize_pieces")
        elif not step.prompts and (family := self.paired.family_for(step.n_rows)) not in READ_OPERANDS:
            yield from step.decode_product(self.paired, family, ready=ready, halves=leaves)
        else:
            yield from step.gated(self.paired)
            if self.paired.family_for(step.n_rows, step.phase) not in READ_OPERANDS:
                for _ in range(self.gate_bias + self.up_bias):
                    yield step.row("add_bias")
                yield step.row("gate")

    def result(self, step: Step, *, ready: bool = False) -> Iterator[Launch]:
        """Launches of the down projection, whose input hidden() has left. ready: see Step.product."""
        given = Input.OPERAND if self.chains(step.n_rows, step.phase) else Input.PLAIN
        yield from step.product(self.down, given=given, ready=ready)


def can_pair(gate: Linear | ExpertLinear | None, up: Linear | ExpertLinear, config: FfnConfig) -> bool:
    """Whether gate and up go in one launch: nothing comes between the products and the activation.

    SWIGLU_CLAMPED also clamps `up`, so no epilogue can fuse it, and none has limits and constants.
    """
    if not fuses(config):
        return False
    if gate is None or kept_as(gate.weight.type) is not kept_as(up.weight.type):
        return False
    plain = all(part.bias is None and is_unscaled(part) for part in (gate, up))
    return plain and config.activation is not Activation.SWIGLU_CLAMPED


def fuses(config: FfnConfig) -> bool:
    """Whether the kernels of products know what is between gate, up and down."""
    apart = config.activation in (Activation.XIELU, Activation.SITU)
    return config.limit is None and not (apart or config.sub_norm or config.sparsity)


def _limits(config: FfnConfig) -> Limits:
    return Limits(config.limit or 0.0, config.limits_gate, config.xielu or config.caps or ())


def is_unscaled(linear: Linear | ExpertLinear) -> bool:
    """Whether the result has no factor."""
    if linear.scale is None or isinstance(linear.scale, float):
        return linear.scale in (None, 1.0)
    return bool((linear.scale == 1.0).all())


def describe_ffn(weights: FfnWeights, config: FfnConfig, chooser: Chooser, *, factor: float = 1.0) -> FfnPlan:
    """A feed-forward part times factor."""
    gate, up = weights.gate, weights.up
    paired = None
    activation = ACTIVATIONS[config.activation]
    if gate is not None and weights.act_scales is None and can_pair(gate, up, config):
        paired = chooser.product([Matrix.of(gate.weight, up.weight)], activation=activation)
    return FfnPlan(
        paired=paired,
        gate=None if paired or gate is None else chooser.projection([gate]),
        up=None if paired else chooser.projection([up]),
        down=chooser.projection([weights.down], factor=factor),
        activation=activation,
        width=config.width,
        act_scales=weights.act_scales is not None,
        limits=_limits(config),
        sub_norm=weights.sub_norm is not None,
        sparsity=config.sparsity,
    )


def describe_expert(
    gate: ExpertLinear | None, up: ExpertLinear, down: ExpertLinear, config: FfnConfig, chooser: Chooser
) -> FfnPlan:
    """One of a layer's experts as a part of its own, multiplied in decode steps and in prompts."""
    activation = ACTIVATIONS[config.activation]
    paired = None
    if gate is not None and can_pair(gate, up, config):
        paired = chooser.product([Matrix.of(gate.weight, up.weight)], activation=activation)

    def alone(stack: ExpertLinear) -> Projection:
        return chooser.one_of(stack, bias=stack.bias is not None)

    return FfnPlan(
        paired=paired,
        gate=None if paired or gate is None else alone(gate),
        up=None if paired else alone(up),
        down=alone(down),
        activation=activation,
        width=config.width,
        limits=_limits(config),
        sparsity=config.sparsity,
    )


def describe_gathered_expert(
    gate: ExpertLinear, up: ExpertLinear, down: ExpertLinear, config: FfnConfig, chooser: Chooser
) -> FfnPlan:
    """One of the experts that decode steps read from a paired stack, as prompts multiply it alone."""
    activation = ACTIVATIONS[config.activation]
    apart = not can_fuse_experts(gate, up, down, config)
    pair = Matrix.of(gate.weight, up.weight)
    return FfnPlan(
        paired=chooser.product([pair], decodes=False, apart=apart, activation=activation),
        gate=None,
        up=None,
        down=chooser.one_of(down, decodes=False, bias=down.bias is not None),
        activation=activation,
        width=config.width,
        gate_bias=gate.bias is not None,
        up_bias=up.bias is not None,
    )


def can_fuse_experts(gate: ExpertLinear, up: ExpertLinear, down: ExpertLinear, config: FfnConfig) -> bool:
    """Whether nothing comes between the products of gathered experts that PREFILL_GEMM does not fold in."""
    biased = any(part.bias is not None for part in (gate, up, down))
    return not biased and config.activation is not Activation.SWIGLU_CLAMPED
