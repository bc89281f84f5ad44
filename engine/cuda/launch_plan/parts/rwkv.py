"""RWKV's layers in the plan: time mixing of versions 6 and 7, and channel mixing.

Their products read inputs of their own, each mixed with that of the token before, so that the normed input itself is
what ssm_in leaves. Letters: D width, R rank of a low-rank product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from engine.cuda.launch_plan.parts.recurrent_plan import RecurrentPlan
from engine.cuda.launch_plan.products import Chooser, Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Launch, Step
from engine.cuda.recurrent.plan import CHUNK_ARCH, Job
from engine.cuda.recurrent.rwkv.rwkv_6 import Rwkv6Shape
from engine.cuda.recurrent.rwkv.rwkv_7 import Rwkv7Shape
from engine.cuda.recurrent.rwkv.shape import TimeMixShape
from engine.cuda.recurrent.rwkv.token_shift import shift_job
from engine.model.config import ChannelMixConfig, Rwkv6Config, Rwkv7Config, TimeMixConfig
from engine.model.weights import ChannelMixWeights, LowRank, Rwkv6Weights, Rwkv7Weights


def row_width(columns: Iterable[int]) -> int:
    """Floats of a row of parts side by side: rows begin at multiples of 16 bytes, as prompts in chunks copy them."""
    return -(-sum(columns) // 4) * 4


MIXED = 5
"""Inputs of version 6 that products of their own mix with those of the token before."""


@dataclass(frozen=True)
class TimeMixPlan(RecurrentPlan):
    """What both versions share.

    Attributes:
        receptance, key, value: products of mixed inputs.
    """

    receptance: Projection
    key: Projection
    value: Projection

    @property
    def mixed_width(self) -> int:
        """See RecurrentPlan.mixed_width."""
        return self.output.columns

    @property
    def columns(self) -> dict[str, int]:
        """Widths of what is kept of a token between the products, side by side in a row, by name."""
        raise NotImplementedError

    def widths(self) -> dict[str, int]:
        """See RecurrentPlan.widths."""
        return super().widths() | {"between": row_width(self.columns.values())}

    def _shifted(self, step: Step) -> Launch:
        return Launch("shift_prompt" if step.prompts else "shift_decode", shift_job())

    def _walked(self, step: Step, jobs: list[Job], name: str) -> Iterator[Launch]:
        """The kernels that read and write memories, with norms and gates."""
        if not step.prompts:
            yield Launch(f"{name}_decode", jobs[0])
            return
        kinds = ("chunks", "walk") if self.chunked else ("prompt",)
        yield from (Launch(f"{name}_{kind}", jobs[1 if self.chunked else 0]) for kind in kinds)
        yield Launch(f"{name}_finish", jobs[0])


@dataclass(frozen=True)
class Rwkv6Plan(TimeMixPlan):
    """Time mixing of RWKV-6.

    Attributes:
        time_mix: the kernels.
        mix_a: from one mixed input to MIXED times R numbers. mix_b: one of MIXED products that expand them.
        gate: a product of a mixed input. decay_a, decay_b: from one to the decays, through R numbers.
    """

    time_mix: Rwkv6Shape
    mix_a: Projection
    mix_b: Projection
    gate: Projection
    decay_a: Projection
    decay_b: Projection

    @property
    def shape(self) -> Rwkv6Shape:
        """See RecurrentPlan.shape."""
        return self.time_mix

    @property
    def columns(self) -> dict[str, int]:
        """See TimeMixPlan.columns."""
        width, keys = self.mixed_width, self.key.width
        found = {"change": width, "inputs": MIXED * width, "r": width, "w": width, "k": keys, "v": keys, "gate": width}
        return found | {"mix": self.mix_a.width, "low": self.decay_a.width}

    @property
    def inner(self) -> tuple[Projection, ...]:
        """See RecurrentPlan.inner."""
        whole = self.receptance, self.key, self.value, self.gate
        return self.mix_a, self.mix_b, *whole, self.decay_a, self.decay_b

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        stack = self.mix_b.parts[0].matrices[0]
        yield from (replace(matrix, count=MIXED) if matrix is stack else matrix for matrix in super().matrices())

    def moved(self, step: Step) -> Iterator[Launch]:
        """See RecurrentPlan.moved."""
        yield self._shifted(step)
        yield from step.product(self.mix_a)
        yield Launch("squash", shift_job())
        for _ in range(MIXED):
            yield from step.product(self.mix_b)
        yield Launch("shift_further", shift_job())
        for projection in (self.receptance, self.key, self.value, self.gate, self.decay_a):
            yield from step.product(projection)
        yield Launch("squash", shift_job())
        yield from step.product(self.decay_b)
        yield from self._walked(step, self.time_mix.build_jobs(), "rwkv_6")


@dataclass(frozen=True)
class LowRankPlan:
    """Two products, one behind the other, with a function between."""

    a: Projection
    b: Projection


@dataclass(frozen=True)
class Rwkv7Plan(TimeMixPlan):
    """Time mixing of RWKV-7.

    Attributes:
        time_mix: the kernels.
        decay, rate: of decays and of a. first_value: of what is taken of the first layer's values; None in that layer.
        gate: of the result's factors, or None.
    """

    time_mix: Rwkv7Shape
    decay: LowRankPlan
    rate: LowRankPlan
    first_value: LowRankPlan | None
    gate: LowRankPlan | None

    @property
    def shape(self) -> Rwkv7Shape:
        """See RecurrentPlan.shape."""
        return self.time_mix

    @property
    def low_rank(self) -> dict[str, LowRankPlan]:
        """By the mixed input that each reads. Behind the first products w becomes tanh, g a sigmoid."""
        pairs = {"w": self.decay, "g": self.gate, "a": self.rate, "v": self.first_value}
        return {name: one for name, one in pairs.items() if one is not None}

    @property
    def mixed(self) -> str:
        """The mixed inputs, in the order of their weights."""
        return "rwkva" if self.gate is None else "rwkvag"

    @property
    def columns(self) -> dict[str, int]:
        """See TimeMixPlan.columns."""
        width = self.mixed_width
        found = {"inputs": len(self.mixed) * width} | dict.fromkeys(("r", "w", "k", "v", "a", "f", "u", "gate"), width)
        return found | {"low": sum(one.a.width for one in self.low_rank.values())}

    @property
    def inner(self) -> tuple[Projection, ...]:
        """See RecurrentPlan.inner."""
        low = (part for one in self.low_rank.values() for part in (one.a, one.b))
        return self.receptance, self.key, self.value, *low

    def widths(self) -> dict[str, int]:
        """See RecurrentPlan.widths."""
        return super().widths() | {"kept": self.mixed_width}

    def moved(self, step: Step) -> Iterator[Launch]:
        """See RecurrentPlan.moved."""
        yield self._shifted(step)
        for projection in (self.receptance, self.key, self.value):
            yield from step.product(projection)
        for one in self.low_rank.values():
            yield from step.product(one.a)
        yield Launch("squash", shift_job())
        for one in self.low_rank.values():
            yield from step.product(one.b)
        jobs = self.time_mix.build_jobs()
        if step.prompts:
            yield Launch("rwkv_7_prepare", jobs[0])
        yield from self._walked(step, jobs, "rwkv_7")


@dataclass(frozen=True)
class ChannelMixPlan:
    """RWKV's feed-forward part.

    Attributes:
        key, value: the products. receptance: of what multiplies the result, or None.
    """

    key: Projection
    value: Projection
    receptance: Projection | None

    def products(self) -> Iterator[Product]:
        """All products."""
        for projection in (self.key, self.value, self.receptance):
            if projection is not None:
                yield from projection.parts

    def widths(self) -> dict[str, int]:
        """What it needs of the activations, by the fields of Widths; the normed input and a result are a mixer's."""
        return {"ffn": self.key.width, "between": row_width([3 * self.key.columns])}

    def launches(self, step: Step) -> Iterator[Launch]:
        """In order, with the norm in front."""
        yield step.part("normalize_pieces")
        yield Launch("shift_prompt" if step.prompts else "shift_decode", shift_job())
        yield from step.product(self.key)
        yield step.row("gate")
        yield from step.product(self.value)
        if self.receptance is not None:
            yield from step.product(self.receptance)
            yield step.part("multiply_gate")
            yield step.row("add_scaled")


def time_mix_shape(config: TimeMixConfig) -> TimeMixShape:
    """The kernel shape of one layer."""
    sizes = config.heads, config.head_width, config.channel_mix
    if isinstance(config, Rwkv6Config):
        return Rwkv6Shape(*sizes, config.kv_heads, config.linear_attention)
    assert isinstance(config, Rwkv7Config)
    return Rwkv7Shape(*sizes)


def describe_time_mix(
    config: TimeMixConfig, weights: Rwkv6Weights | Rwkv7Weights, chooser: Chooser, *, factor: float
) -> TimeMixPlan:
    """The time mixing of one layer; what it adds to the stream is multiplied by factor."""
    shape, output = time_mix_shape(config), chooser.projection([weights.output], factor=factor)
    receptance, key, value = (chooser.projection([one]) for one in (weights.receptance, weights.key, weights.value))
    chunked = shape.chunk_width if chooser.card.arch >= CHUNK_ARCH else 0
    if isinstance(weights, Rwkv6Weights):
        assert isinstance(shape, Rwkv6Shape)
        return Rwkv6Plan(
            inputs=None,
            output=output,
            chunked=chunked,
            receptance=receptance,
            key=key,
            value=value,
            time_mix=shape,
            mix_a=chooser.projection([weights.mix_a]),
            mix_b=chooser.one_of(weights.mix_b),
            gate=chooser.projection([weights.gate]),
            decay_a=chooser.projection([weights.decay.a]),
            decay_b=chooser.projection([weights.decay.b]),
        )
    assert isinstance(shape, Rwkv7Shape)

    def chain(low: LowRank) -> LowRankPlan:
        return LowRankPlan(chooser.projection([low.a]), chooser.projection([low.b]))

    return Rwkv7Plan(
        inputs=None,
        output=output,
        chunked=chunked,
        receptance=receptance,
        key=key,
        value=value,
        time_mix=shape,
        decay=chain(weights.decay),
        rate=chain(weights.rate),
        first_value=None if weights.first_value is None else chain(weights.first_value),
        gate=None if weights.gate is None else chain(weights.gate),
    )


def describe_channel_mix(
    weights: ChannelMixWeights, config: ChannelMixConfig, chooser: Chooser, *, factor: float
) -> ChannelMixPlan:
    """The channel mixing of one layer; what it adds to the stream is multiplied by factor."""
    receptance = None if weights.receptance is None else chooser.projection([weights.receptance])
    return ChannelMixPlan(
        chooser.projection([weights.key]), chooser.projection([weights.value], factor=factor), receptance
    )
