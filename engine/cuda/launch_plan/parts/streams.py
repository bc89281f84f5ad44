"""What some families do with the residual stream beside the parts of a layer: launches and products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.cuda.launch_plan.products import Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Launch, Step
from engine.cuda.rows import streams


@dataclass(frozen=True)
class LayerInputPlan:
    """What a token's own vector for a layer adds to the layer's result; see engine.model.config.LayerConfig.

    Attributes:
        inp_gate: from the stream to P numbers. proj: back.
        in_streams: it is added to several streams.
    """

    inp_gate: Projection
    proj: Projection
    in_streams: bool

    def products(self) -> Iterator[Product]:
        """All products."""
        yield from self.inp_gate.parts
        yield from self.proj.parts

    def launches(self, step: Step) -> Iterator[Launch]:
        """In order."""
        yield from step.product(self.inp_gate)
        yield step.part("rotate_pieces")
        yield step.row("gate")
        yield from step.product(self.proj)
        yield step.part("normalize_pieces")
        if self.in_streams:
            yield stream_launch("altup_add")


@dataclass(frozen=True)
class LaurelPlan:
    """The low-rank projections beside a mixer; see engine.model.config.LayerConfig.laurel_rank."""

    left: Projection
    right: Projection

    def products(self) -> Iterator[Product]:
        """All products."""
        yield from self.left.parts
        yield from self.right.parts

    def before(self, step: Step) -> Iterator[Launch]:
        """In front of the mixer: what it reads is kept."""
        yield step.part("normalize_pieces")

    def after(self, step: Step) -> Iterator[Launch]:
        """Behind it."""
        yield from step.product(self.left)
        yield from step.product(self.right)
        yield step.part("normalize_pieces")
        yield step.row("add_scaled")
        yield step.part("scale")


@dataclass(frozen=True)
class PerLayerPlan:
    """A vector of every token for each layer; see engine.model.config.ModelConfig.per_layer_width.

    Attributes:
        token_embd: table of L * P numbers of a token. model_proj: as many of its embedding.
        width: P.
    """

    token_embd: Matrix
    model_proj: Projection
    width: int

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        yield self.token_embd
        yield from (matrix for part in self.model_proj.parts for matrix in part.matrices)

    def launches(self, step: Step) -> Iterator[Launch]:
        """In order."""
        yield step.embed(self.token_embd)
        yield from step.product(self.model_proj)
        yield step.part("normalize_pieces")


@dataclass(frozen=True)
class SpreadPlan:
    """A residual stream of several vectors before the first layer and behind the last; see AltUpConfig.

    Attributes:
        count: A. proj, unembd_proj: one of A - 1 products, to a stream and from one.
    """

    count: int
    proj: Projection
    unembd_proj: Projection

    def products(self) -> Iterator[Product]:
        """All products; of those that are alike one."""
        yield from self.proj.parts
        yield from self.unembd_proj.parts

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        matrices = (matrix for product in self.products() for matrix in product.matrices)
        yield from (replace(matrix, count=self.count - 1) for matrix in matrices)

    def begin(self, step: Step) -> Iterator[Launch]:
        """From embeddings to streams."""
        yield step.part("rotate_pieces")
        for _ in range(self.count - 1):
            yield from step.product(self.proj)
            yield stream_launch("altup_lengthen")

    def end(self, step: Step) -> Iterator[Launch]:
        """From streams to what the head reads."""
        yield step.part("rotate_pieces")
        for _ in range(self.count - 1):
            yield from step.product(self.unembd_proj)
            yield stream_launch("altup_lengthen")
        yield step.part("scale")


def stream_launch(kernel: str) -> Launch:
    """A kernel of streams.cu."""
    return Launch(kernel, (streams.FILES, None))
