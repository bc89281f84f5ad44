"""One layer in the plan: a mixer, a feed-forward part, their norms, and the operands that products leave for others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from engine.cuda.launch_plan.attention import AttentionPlan
from engine.cuda.launch_plan.feed_forward import FfnPlan
from engine.cuda.launch_plan.mixture import MoePlan
from engine.cuda.launch_plan.products import Matrix, Product
from engine.cuda.launch_plan.recurrent import MambaPlan
from engine.cuda.launch_plan.steps import Launch, Norm, Step

MixerPlan = AttentionPlan | MambaPlan
"""The part of a layer that reads other tokens; one class per class of engine.model.config.MixerConfig."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer.

    Attributes:
        index: its number.
        mixer: the part that reads other tokens. ffn: the feed-forward part, or None.
        attn_norm, attn_post_norm, ffn_norm, ffn_post_norm: where each norm is computed.
        parallel: the feed-forward part reads the layer's input.
        leaves_inside: the mixer's last product leaves the operand of gate and up, where Step.hands_over.
        leaves_behind: the last product leaves the operand of the product that reads the stream next, likewise.
        takes_left: the mixer's first product reads what the layer before has left.
    """

    index: int
    mixer: MixerPlan
    ffn: FfnPlan | MoePlan | None
    attn_norm: Norm
    attn_post_norm: Norm
    ffn_norm: Norm
    ffn_post_norm: Norm
    parallel: bool
    leaves_inside: bool = False
    leaves_behind: bool = False
    takes_left: bool = False

    @property
    def moe(self) -> MoePlan | None:
        """The mixture of experts, if the layer has one."""
        return self.ffn if isinstance(self.ffn, MoePlan) else None

    def products(self) -> Iterator[Product]:
        """All products."""
        yield from self.mixer.products()
        if self.ffn is not None:
            yield from self.ffn.products()

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        yield from self.mixer.matrices()
        if isinstance(self.ffn, MoePlan):
            yield from self.ffn.matrices()
        elif self.ffn is not None:
            yield from (matrix for product in self.ffn.products() for matrix in product.matrices)

    def launches(self, step: Step) -> Iterator[Launch]:
        """The layer in order."""
        ready = self.takes_left and step.hands_over
        *before, (last, result) = self.mixer.bricks(step, self.attn_norm, ready=ready)
        for brick, launches in before:
            yield from self._named(brick, launches)
        yield from self._named(last, self._added(step, result, self.attn_post_norm))
        if self.ffn is None:
            return
        if isinstance(self.ffn, MoePlan):
            post = self.ffn_post_norm is not Norm.ABSENT
            yield from self._named("ffn_moe", self.ffn.launches(step, norm=self.ffn_norm, post=post))
            yield from self._named("ffn_moe", self._joined(step))
            return
        ready = self.leaves_inside and step.hands_over
        yield from self._named("ffn_gate_up", step.norm(self.ffn_norm))
        yield from self._named("ffn_gate_up", self.ffn.hidden(step, ready=ready))
        yield from self._named("ffn_down", self._added(step, self.ffn.result(step), self.ffn_post_norm))
        yield from self._named("ffn_down", self._joined(step))

    def _named(self, brick: str, launches: Iterable[Launch]) -> Iterator[Launch]:
        return (replace(launch, brick=brick, layer=self.index) for launch in launches)

    @staticmethod
    def _added(step: Step, launches: Iterable[Launch], post: Norm) -> Iterator[Launch]:
        """Products whose result is added to the stream, with the norm behind them."""
        yield from launches
        if post is not Norm.ABSENT:
            yield step.part("normalize_pieces")

    def _joined(self, step: Step) -> Iterator[Launch]:
        if self.parallel:
            yield step.row("add_scaled")


def leaves_inside(layer: LayerPlan) -> bool:
    """Whether the mixer's last product can leave the operand of gate and up."""
    if layer.parallel or layer.attn_post_norm is not Norm.ABSENT or not isinstance(layer.ffn, FfnPlan):
        return False
    paired = layer.ffn.paired
    takes = paired is not None and paired.takes_operand
    return takes and layer.ffn_norm is Norm.FOLDED and layer.mixer.output.emits


def leaves_behind(layer: LayerPlan, next_norm: Norm) -> bool:
    """Whether the layer's last product can leave the operand of products of a norm of the stream."""
    if layer.parallel or isinstance(layer.ffn, MoePlan) or next_norm is not Norm.FOLDED:
        return False
    if layer.ffn is None:
        return layer.attn_post_norm is Norm.ABSENT and layer.mixer.output.emits
    return layer.ffn_post_norm is Norm.ABSENT and layer.ffn.down.emits
