"""One layer in the plan: a mixer, a feed-forward part, their norms, and the operands that products leave for others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from engine.cuda.driver import staging
from engine.cuda.launch_plan.parts.attention import AttentionPlan
from engine.cuda.launch_plan.parts.compressed import CompressedPlan
from engine.cuda.launch_plan.parts.feed_forward import FfnPlan
from engine.cuda.launch_plan.parts.mixture import MoePlan
from engine.cuda.launch_plan.parts.ngrams import NgramPlan
from engine.cuda.launch_plan.parts.recurrent_plan import RecurrentPlan
from engine.cuda.launch_plan.parts.rwkv import ChannelMixPlan
from engine.cuda.launch_plan.parts.skips import SkipPlan
from engine.cuda.launch_plan.parts.streams import LaurelPlan, LayerInputPlan, stream_launch
from engine.cuda.launch_plan.products import Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Brick, Launch, Norm, Step


@dataclass(frozen=True)
class CombinedPlan:
    """Attention and a recurrent mixer that read the same normed input; both add to the stream."""

    attention: AttentionPlan
    recurrent: RecurrentPlan

    @property
    def takes_operand(self) -> bool:
        """Whether the first products read an operand that an earlier layer has left."""
        return self.attention.takes_operand and self.recurrent.takes_operand

    @property
    def output(self) -> Projection:
        """The last product."""
        return self.recurrent.output

    def products(self) -> Iterator[Product]:
        """All products."""
        yield from self.attention.products()
        yield from self.recurrent.products()

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        yield from self.attention.matrices()
        yield from self.recurrent.matrices()

    def widths(self) -> dict[str, int]:
        """What it needs of the activations, by the fields of Widths."""
        return self.attention.widths() | self.recurrent.widths()

    def bricks(self, step: Step, norm: Norm, *, ready: bool) -> Iterator[Brick]:
        """See AttentionPlan.bricks. Both parts have read the stream before anything is added to it."""
        queries, attended, added = self.attention.bricks(step, norm, ready=ready)
        inputs, moved, last = self.recurrent.bricks(step, norm, ready=ready)
        yield from (queries, inputs, attended, added, moved, last)


MixerPlan = AttentionPlan | CompressedPlan | RecurrentPlan | CombinedPlan
"""The part of a layer that reads other tokens; one class per class of engine.model.config.MixerConfig."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer.

    Attributes:
        index: its number.
        mixer: the part that reads other tokens, or None. ffn: the feed-forward part, or None.
        attn_norm, attn_post_norm, ffn_norm, ffn_post_norm: where each norm is computed.
        parallel: the feed-forward part reads the layer's input.
        attn_output_norm, attn_norm_2: whether there are these norms behind the mixer's residual; last_norm: whether the
            result is normalized.
        embedding_skip: embeddings are added to the result. scales: the result is multiplied by a number.
        layer_input: what the token's own vector for the layer adds to the result, or None. laurel: projections beside
            the mixer, or None. streams: the layer is passed by one of several streams.
        ngrams: what the last few tokens add to the layer's input, or None.
        mixer_skip, ffn_skip: what skips the mixer and the feed-forward part, where that is more than x; else None.
        leaves_inside: the mixer's last product leaves the operand of gate and up, where Step.hands_over.
        leaves_hidden: gate and up leave the operand of the down projection, likewise.
        leaves_behind: the last product leaves the operand of the product that reads the stream next, likewise.
        takes_left: the mixer's first product reads what the layer before has left.
    """

    index: int
    mixer: MixerPlan | None
    ffn: FfnPlan | MoePlan | ChannelMixPlan | None
    attn_norm: Norm
    attn_post_norm: Norm
    ffn_norm: Norm
    ffn_post_norm: Norm
    parallel: bool
    attn_output_norm: bool = False
    attn_norm_2: bool = False
    last_norm: bool = False
    embedding_skip: bool = False
    scales: bool = False
    layer_input: LayerInputPlan | None = None
    laurel: LaurelPlan | None = None
    streams: bool = False
    ngrams: NgramPlan | None = None
    mixer_skip: SkipPlan | None = None
    ffn_skip: SkipPlan | None = None
    leaves_inside: bool = False
    leaves_hidden: bool = False
    leaves_behind: bool = False
    takes_left: bool = False

    @property
    def moe(self) -> MoePlan | None:
        """The mixture of experts, if the layer has one."""
        return self.ffn if isinstance(self.ffn, MoePlan) else None

    @property
    def attention(self) -> AttentionPlan | None:
        """The attention, if the layer has it."""
        if isinstance(self.mixer, CombinedPlan):
            return self.mixer.attention
        return self.mixer if isinstance(self.mixer, AttentionPlan) else None

    @property
    def compressed(self) -> CompressedPlan | None:
        """The attention over compressed blocks, if the layer has it."""
        return self.mixer if isinstance(self.mixer, CompressedPlan) else None

    @property
    def attends(self) -> bool:
        """Whether the layer has attention of either kind."""
        return self.attention is not None or self.compressed is not None

    @property
    def recurrent(self) -> RecurrentPlan | None:
        """The recurrent mixer, if the layer has one."""
        if isinstance(self.mixer, CombinedPlan):
            return self.mixer.recurrent
        return self.mixer if isinstance(self.mixer, RecurrentPlan) else None

    @property
    def takes_operand(self) -> bool:
        """Whether what reads the stream first can read an operand that an earlier layer has left."""
        return self.mixer is not None and self.ngrams is None and self.mixer.takes_operand

    @property
    def narrows(self) -> bool:
        """Whether rows whose result is not wanted can end behind attention's keys and values.

        What the layer does behind them reads and writes the rows of its mixer's result and of the stream alone.
        """
        if not isinstance(self.mixer, AttentionPlan) or not isinstance(self.ffn, FfnPlan | MoePlan):
            return False
        moe, beside = self.moe, (self.layer_input, self.laurel, self.ngrams, self.mixer_skip, self.ffn_skip)
        changed = self.parallel or self.attn_output_norm or self.attn_norm_2 or self.streams or self.embedding_skip
        early = moe is not None and (moe.routed_early or moe.reads_input)
        return self.mixer.ends_plainly and not changed and not early and all(part is None for part in beside)

    def products(self) -> Iterator[Product]:
        """All products."""
        if self.mixer is not None:
            yield from self.mixer.products()
        if self.ffn is not None:
            yield from self.ffn.products()
        for part in (self.layer_input, self.laurel, self.mixer_skip, self.ffn_skip, self.ngrams):
            if part is not None:
                yield from part.products()

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        if self.mixer is not None:
            yield from self.mixer.matrices()
        if isinstance(self.ffn, MoePlan):
            yield from self.ffn.matrices()
        elif self.ffn is not None:
            yield from (matrix for product in self.ffn.products() for matrix in product.matrices)
        if self.ngrams is not None:
            yield from self.ngrams.matrices()
        for part in (self.layer_input, self.laurel, self.mixer_skip, self.ffn_skip):
            if part is not None:
                yield from (matrix for product in part.products() for matrix in product.matrices)

    def launches(self, step: Step) -> Iterator[Launch]:
        """The layer in order."""
        ready = self.takes_left and step.hands_over
        if self.streams:
            yield from self._named("attn_qkv", [stream_launch("altup_predict")])
        if self.laurel is not None:
            yield from self._named("attn_qkv", self.laurel.before(step))
        if self.moe is not None and self.moe.routed_early:
            yield from self._named("ffn_moe", self.moe.scores(step, Norm.ABSENT))
        if self.moe is not None and self.moe.reads_input:
            yield from self._named("ffn_moe", [step.part("normalize_pieces")])
        first, inputs = "attn_qkv" if self.attends else "ssm_in", {"attn_qkv", "ssm_in"}
        if self.ngrams is not None:
            yield from self._named(first, self.ngrams.launches(step))
        if self.attn_norm_2:
            yield from self._named("attn_qkv", [step.row("copy_rows")])
        last, waiting = "attn_output" if self.attends else "ssm_out", self.mixer_skip
        if self.mixer_skip is not None:
            yield from self._named(first, self.mixer_skip.read(step))
        for brick in () if self.mixer is None else self.mixer.bricks(step, self.attn_norm, ready=ready):
            if waiting is not None and brick.name not in inputs:
                yield from self._named(first, waiting.begin(step))
                waiting = None
            launches = self._added(step, brick.launches, self.attn_post_norm) if brick.added else brick.launches
            yield from self._named(brick.name, launches)
        if self.attn_output_norm:
            yield from self._named("attn_output", [step.part("normalize_pieces")])
        if self.attn_norm_2:
            yield from self._named("attn_output", [step.row("add_scaled"), step.part("normalize_pieces")])
        if self.laurel is not None:
            yield from self._named("attn_output", self.laurel.after(step))
        if self.mixer_skip is not None:
            yield from self._named(last, self.mixer_skip.write(step))
        yield from self._fed(step)
        yield from self._named(self._last_brick, self._finished(step))

    def narrowed(self, step: Step, n_rows: int) -> Iterator[Launch]:
        """The layer, which narrows, where only so many rows are wanted."""
        yield from (launch for launch in self.launches(step) if launch.brick == "attn_qkv")
        if not n_rows:
            return
        few = replace(step, n_rows=n_rows, gathered=True)
        for launch in self.launches(few):
            if launch.brick != "attn_qkv":
                yield launch
            if launch.brick == "attention":
                gather = Launch("gather_rows", (staging.FILES, None))
                yield from self._named("attn_output", [gather, gather])

    @property
    def _last_brick(self) -> str:
        if isinstance(self.ffn, ChannelMixPlan):
            return "channel_mix"
        return "ffn_down" if self.moe is None else "ffn_moe"

    def _finished(self, step: Step) -> Iterator[Launch]:
        """What happens to the result."""
        if self.embedding_skip:
            yield step.part("add_times")
        if self.last_norm:
            yield step.part("normalize_pieces")
        if self.streams:
            yield stream_launch("altup_correct")
        if self.layer_input is not None:
            yield from self.layer_input.launches(step)
        if self.scales:
            yield step.part("scale")

    @property
    def changes_after(self) -> bool:
        """Whether something happens to the result behind the feed-forward part."""
        return self.last_norm or self.embedding_skip or self.scales or self.streams or self.layer_input is not None

    def _fed(self, step: Step) -> Iterator[Launch]:
        """The feed-forward part."""
        if self.ffn is None:
            return
        if isinstance(self.ffn, ChannelMixPlan):
            yield from self._named("channel_mix", self.ffn.launches(step))
            return
        skip = self.ffn_skip
        if skip is not None:
            yield from self._named("ffn_gate_up" if self.moe is None else "ffn_moe", skip.read(step))
        if isinstance(self.ffn, MoePlan):
            post = self.ffn_post_norm is not Norm.ABSENT
            yield from self._named("ffn_moe", self.ffn.launches(step, norm=self.ffn_norm, post=post, skip=skip))
            yield from self._named("ffn_moe", self._joined(step))
            if skip is not None:
                yield from self._named("ffn_moe", skip.write(step))
            return
        ready, leaves = (one and step.hands_over for one in (self.leaves_inside, self.leaves_hidden))
        yield from self._named("ffn_gate_up", step.norm(self.ffn_norm))
        yield from self._named("ffn_gate_up", self.ffn.hidden(step, ready=ready, leaves=leaves))
        if skip is not None:
            yield from self._named("ffn_gate_up", skip.begin(step))
        down = self.ffn.result(step, ready=leaves)
        yield from self._named("ffn_down", self._added(step, down, self.ffn_post_norm))
        yield from self._named("ffn_down", self._joined(step))
        if skip is not None:
            yield from self._named("ffn_down", skip.write(step))

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
    changed = layer.parallel or layer.attn_output_norm or layer.laurel is not None or layer.ffn_skip is not None
    if layer.mixer is None or changed or layer.attn_post_norm is not Norm.ABSENT:
        return False
    if not isinstance(layer.ffn, FfnPlan):
        return False
    paired = layer.ffn.paired
    takes = paired is not None and paired.takes_operand
    return takes and layer.ffn_norm is Norm.FOLDED and layer.mixer.output.emits


def leaves_hidden(layer: LayerPlan, multiprocessors: int) -> bool:
    """Whether gate and up can leave the operand of the down projection: where their own is left for them.

    Else theirs is made in the memory that the down projection's would be in.
    """
    if not isinstance(layer.ffn, FfnPlan) or not leaves_inside(layer):
        return False
    paired, down = layer.ffn.paired, layer.ffn.down
    assert paired is not None
    return paired.emits_halves(multiprocessors) and down.takes_operand and down.columns == paired.width


def leaves_behind(layer: LayerPlan, next_norm: Norm) -> bool:
    """Whether the layer's last product can leave the operand of products of a norm of the stream."""
    changed = layer.parallel or layer.changes_after or layer.ffn_skip is not None
    if changed or isinstance(layer.ffn, ChannelMixPlan) or next_norm is not Norm.FOLDED:
        return False
    if isinstance(layer.ffn, MoePlan):
        return layer.ffn_post_norm is Norm.ABSENT and layer.ffn.emits
    if layer.ffn is None:
        mixed = layer.mixer is not None and layer.mixer.output.emits
        return mixed and layer.attn_post_norm is Norm.ABSENT
    return layer.ffn_post_norm is Norm.ABSENT and layer.ffn.down.emits
