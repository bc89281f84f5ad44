"""Residual connections that are more than a sum, in the plan; formulas: engine/model/config/skips.py.

A part reads x, which is made of the streams (read); then x is made ready for what the part adds to it (begin); and what
x holds behind the part changes the streams (write). Letters: S streams, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.cuda.launch_plan.products import Chooser, Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Launch, Step
from engine.cuda.rows import skips
from engine.model.config import (
    BankedSkip,
    GatedSkip,
    HyperSkip,
    MixedSkip,
    NormedSkip,
    SkipConfig,
    StackSkip,
    most_streams,
)
from engine.model.weights import (
    BankedSkipWeights,
    GatedSkipWeights,
    HyperSkipWeights,
    LayerWeights,
    MeanSkipWeights,
    MixedSkipWeights,
    SkipWeights,
    StackSkipWeights,
)


def skip_launch(kernel: str) -> Launch:
    """A kernel of skips.cu."""
    return Launch(kernel, (skips.FILES, None))


class SkipPlan(ABC):
    """What skips one part of a layer, or what the head reads."""

    @property
    def inner(self) -> tuple[Projection, ...]:
        """Its products."""
        return ()

    def products(self) -> Iterator[Product]:
        """All products."""
        yield from (part for projection in self.inner for part in projection.parts)

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        yield from (matrix for product in self.products() for matrix in product.matrices)

    def widths(self, width: int) -> dict[str, int]:
        """What it needs of the activations, by the fields of Widths. width: D."""
        return {}

    @abstractmethod
    def read(self, step: Step) -> Iterator[Launch]:
        """Launches that make x of the streams."""

    def begin(self, step: Step) -> Iterator[Launch]:
        """Those between the products that read x and those that add to it."""
        yield step.part("clear")

    def write(self, step: Step) -> Iterator[Launch]:
        """Those behind the part."""
        yield from ()


@dataclass(frozen=True)
class NormedSkipPlan(SkipPlan):
    """x becomes scale times its norm, which the part reads."""

    scale: float

    def read(self, step: Step) -> Iterator[Launch]:
        """See SkipPlan.read."""
        yield step.part("normalize_pieces")

    def begin(self, step: Step) -> Iterator[Launch]:
        """See SkipPlan.begin."""
        yield step.part("scale")


@dataclass(frozen=True)
class BankedSkipPlan(SkipPlan):
    """Attention over earlier states.

    Attributes:
        count: states that are read, the running sum among them. banks: the part banks that sum.
    """

    count: int
    banks: bool

    def read(self, step: Step) -> Iterator[Launch]:
        """See SkipPlan.read."""
        yield skip_launch("bank_read")

    def write(self, step: Step) -> Iterator[Launch]:
        """See SkipPlan.write."""
        yield skip_launch("bank_write")


@dataclass(frozen=True)
class HyperSkipPlan(SkipPlan):
    """Hyper-connections with low-rank gates. inject: None for the head."""

    count: int
    down: Projection
    up: Projection
    inject: Projection | None

    @property
    def inner(self) -> tuple[Projection, ...]:
        """See SkipPlan.inner."""
        return (self.down, self.up) if self.inject is None else (self.down, self.up, self.inject)

    def widths(self, width: int) -> dict[str, int]:
        """See SkipPlan.widths."""
        return {"predicted": self.up.width, "stream_gates": self.up.width, "skip": self.count + self.down.width}

    def read(self, step: Step) -> Iterator[Launch]:
        """See SkipPlan.read."""
        yield step.part("normalize_pieces")
        yield from step.product(self.down)
        yield step.row("gate")
        yield from step.product(self.up)
        yield skip_launch("hyper_read")
        if self.inject is not None:
            yield from step.product(self.inject)

    def write(self, step: Step) -> Iterator[Launch]:
        """See SkipPlan.write."""
        yield skip_launch("gated_write")


@dataclass(frozen=True)
class GatedSkipPlan(SkipPlan):
    """Hyper-connections with one gate per stream and direction, or whose streams mix.

    Attributes:
        fn: the product that gives the gates. config: of the model.
    """

    fn: Projection
    config: GatedSkip | MixedSkip

    @property
    def inner(self) -> tuple[Projection, ...]:
        """See SkipPlan.inner."""
        return (self.fn,)

    def widths(self, width: int) -> dict[str, int]:
        """See SkipPlan.widths."""
        return {"predicted": self.config.count * width, "skip": self.fn.width}

    def read(self, step: Step) -> Iterator[Launch]:
        """See SkipPlan.read."""
        yield step.part("normalize_pieces")
        yield from step.product(self.fn)
        yield skip_launch("gated_read")

    def write(self, step: Step) -> Iterator[Launch]:
        """See SkipPlan.write."""
        yield skip_launch("mixed_write" if isinstance(self.config, MixedSkip) else "gated_write")


@dataclass(frozen=True)
class MeanSkipPlan(SkipPlan):
    """The head of streams that mix reads their mean."""

    count: int

    def read(self, step: Step) -> Iterator[Launch]:
        """See SkipPlan.read."""
        yield skip_launch("sum_streams")


@dataclass(frozen=True)
class StackSkipPlan(SkipPlan):
    """Two states a and b, and a residual stream r. first, count: vectors of a, b and r whose sum is read.

    Attributes:
        ends: vectors that become the norm of what the part gives; (): it is r.
    """

    first: int
    count: int
    ends: tuple[int, ...]

    def read(self, step: Step) -> Iterator[Launch]:
        """See SkipPlan.read."""
        yield skip_launch("sum_streams")

    def begin(self, step: Step) -> Iterator[Launch]:
        """See SkipPlan.begin: the part adds to what it has read."""
        yield from ()

    def write(self, step: Step) -> Iterator[Launch]:
        """See SkipPlan.write."""
        yield from (step.part("normalize_pieces") for _ in self.ends)
        if not self.ends:
            yield step.part("rotate_pieces")


@dataclass(frozen=True)
class SkipsPlan:
    """The residual connections of a model whose streams are not x itself.

    Attributes:
        streams: S. filled: streams that begin as the embedding. head: what the head reads.
    """

    streams: int
    filled: int
    head: SkipPlan

    @staticmethod
    def begin() -> Iterator[Launch]:
        """Behind the embedding."""
        yield skip_launch("fill_streams")


def describe_skips(
    config: SkipConfig | None, layers: Sequence[LayerWeights], head: SkipWeights | None, chooser: Chooser
) -> tuple[list[tuple[SkipPlan | None, SkipPlan | None]], SkipsPlan | None]:
    """What skips mixer and feed-forward part of every layer, and what the head reads; None where x itself does."""
    if config is None:
        return [(None, None)] * len(layers), None
    if isinstance(config, NormedSkip):
        plan = NormedSkipPlan(config.scale)
        return [(plan, plan)] * len(layers), None
    found, banked = [], 0
    for layer in layers:
        parts: list[SkipPlan | None] = []
        for weights in (layer.mixer_skip, layer.ffn_skip):
            parts.append(None if weights is None else _of_part(config, weights, chooser, banked))
            banked += isinstance(weights, BankedSkipWeights) and weights.banks
        found.append((parts[0], parts[1]))
    assert head is not None
    streams = 1 + banked if isinstance(config, BankedSkip) else most_streams(config, len(layers))
    filled = 1 if isinstance(config, BankedSkip) else streams
    return found, SkipsPlan(streams, filled, _of_part(config, head, chooser, banked))


def _of_part(config: SkipConfig, weights: SkipWeights, chooser: Chooser, banked: int) -> SkipPlan:
    if isinstance(weights, BankedSkipWeights):
        return BankedSkipPlan(1 + banked, weights.banks)
    if isinstance(weights, HyperSkipWeights):
        assert isinstance(config, HyperSkip)
        share = 1.0 / config.count
        inject = None if weights.inject is None else chooser.projection([weights.inject], factor=share)
        low = chooser.projection([weights.down], factor=share), chooser.projection([weights.up])
        return HyperSkipPlan(config.count, *low, inject)
    if isinstance(weights, (GatedSkipWeights, MixedSkipWeights)):
        assert isinstance(config, (GatedSkip, MixedSkip))
        return GatedSkipPlan(chooser.projection([weights.fn]), config)
    if isinstance(weights, MeanSkipWeights):
        assert isinstance(config, MixedSkip)
        return MeanSkipPlan(config.count)
    assert isinstance(weights, StackSkipWeights)
    assert isinstance(config, StackSkip)
    if weights.init is not None:  # the head
        return StackSkipPlan(0, 1, ())
    ends = () if not weights.ends else ((0, 2) if weights.high else (1, 2))
    return StackSkipPlan(0 if weights.begins else 2, 2 if weights.begins else 1, ends)
