"""Attention in the plan: its products, the kernels between them, and the shape of the heads.

A kind of mixer is one such part: its matrices, the widths it needs, and its launches from the layer's norm to the
residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config import KvType
from engine.cuda.attention import attention_plan
from engine.cuda.attention.attention_shape import ALIGNED, AttentionShape, KernelRopeStyle
from engine.cuda.attention.cache import CacheShape
from engine.cuda.launch_plan.families import Card, Family
from engine.cuda.launch_plan.parts.indexer import IndexerPlan, describe_indexer
from engine.cuda.launch_plan.parts.latent import LatentPlan, describe_latent, gate_columns
from engine.cuda.launch_plan.parts.norms import folds
from engine.cuda.launch_plan.products import Chooser, Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Brick, Input, Launch, Norm, Step
from engine.model.config import AttentionConfig, QkNorm, RopeStyle
from engine.model.relative import FARTHEST
from engine.model.weights import AttentionWeights, Linear

_ROPE_STYLES = {RopeStyle.NORM: KernelRopeStyle.ADJACENT, RopeStyle.NEOX: KernelRopeStyle.HALVES}


@dataclass(frozen=True)
class AttentionPlan:
    """Attention of one layer.

    Attributes:
        shape: heads, as the kernels are built for them.
        qkv: queries, keys, values and gates, if there are any; None where they come from `latent`.
        latent: see LatentPlan, or None.
        output: the output projection.
        clamps, rotates: row kernels before the attention kernels: limits, rotation.
        q_norm, k_norm, v_norm: likewise, norms that the attention kernels do not compute.
        folds_norms: the attention kernels normalize queries and keys.
        gates: numbers that multiply the heads' values, of a row.
        sub_norm: what the output projection reads is normalized.
        kept_at: where the rows of Activations.kept hold the keys and values of this layer, which later layers read, or
            those of the earlier layer that this one reads; None: neither.
        cache_layer: that earlier layer, or None.
        indexer: chooses the positions of rows that have more than it lets through; None: all are read.
        leaves_operand: decode attention leaves the operand of the output projection, where Step.hands_over.
        prompts_leave_operand: attention of prompts leaves it.
    """

    shape: AttentionShape
    qkv: Projection | None
    latent: LatentPlan | None
    output: Projection
    clamps: bool
    rotates: bool
    q_norm: bool
    k_norm: bool
    v_norm: bool
    folds_norms: bool
    gates: int = 0
    sub_norm: bool = False
    kept_at: int | None = None
    cache_layer: int | None = None
    indexer: IndexerPlan | None = None
    leaves_operand: bool = False
    prompts_leave_operand: bool = False

    @property
    def ends_plainly(self) -> bool:
        """Whether nothing behind the attention kernel reads rows other than those of its result and the stream."""
        plain = self.latent is None and self.indexer is None
        room = self.shape.heads * self.shape.value_dim <= self.shape.row_width  # gathered where the queries were
        return plain and room and not self.gates and not self.sub_norm

    @property
    def cache_shape(self) -> CacheShape:
        """What the layer caches, where it has a cache of its own."""
        return CacheShape(self.shape, 0 if self.indexer is None else self.indexer.cached_width)

    @property
    def all_chosen(self) -> int | None:
        """With at most so many positions all of them are attended to; None: always."""
        return None if self.indexer is None else self.indexer.shape.all_chosen

    @property
    def prepares(self) -> bool:
        """Whether row kernels change queries, keys or values before the attention kernels read them."""
        return self.clamps or self.rotates or self.q_norm or self.k_norm or self.v_norm

    @property
    def kept_width(self) -> int:
        """Keys and values of a row."""
        return self.shape.kv_heads * (self.shape.key_dim + self.shape.value_dim)

    @property
    def takes_operand(self) -> bool:
        """Whether the first products read an operand that an earlier layer has left."""
        return self.qkv is not None and self.qkv.takes_operand

    def products(self) -> Iterator[Product]:
        """All products."""
        if self.qkv is not None:
            yield from self.qkv.parts
        if self.latent is not None:
            yield from self.latent.products()
        if self.indexer is not None:
            yield from self.indexer.products()
        yield from self.output.parts

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        if self.latent is not None:
            yield from self.latent.matrices()
        if self.indexer is not None:
            yield from self.indexer.matrices()
        for projection in (self.qkv, self.output):
            if projection is not None:
                yield from (matrix for part in projection.parts for matrix in part.matrices)

    def widths(self) -> dict[str, int]:
        """What it needs of the activations, by the fields of Widths."""
        found = {"qkv": self.shape.row_width, "attention": self.shape.heads * self.shape.value_dim}
        if self.latent is not None:
            latent, heads = self.latent.config, self.latent.heads
            found |= {
                "inputs": self.latent.inputs.width,
                "queries": heads * (latent.nope_width + latent.rope_width),
                "heads": heads * (latent.nope_width + latent.value_width),
            }
        if self.kept_at is not None:
            found["kept"] = self.kept_at + self.kept_width
        if self.indexer is not None:
            found |= self.indexer.widths()
        return found

    # ---- launches --------------------------------------------------------------------------------------------

    def bricks(self, step: Step, norm: Norm, *, ready: bool) -> Iterator[Brick]:
        """The bricks in order with their launches.

        Args:
            step: the step.
            norm: where the layer's first norm is computed.
            ready: an earlier layer has left the operand of the first product.
        """
        yield Brick("attn_qkv", self.queries(step, norm, ready=ready))
        yield Brick("attention", self.attention(step))
        yield Brick("attn_output", self.result(step), added=True)

    def queries(self, step: Step, norm: Norm, *, ready: bool) -> Iterator[Launch]:
        """The brick attn_qkv. ready: see Step.product."""
        yield from step.norm(norm)
        if self.qkv is not None:
            yield from step.product(self.qkv, ready=ready)
        else:
            assert self.latent is not None
            yield from self.latent.launches(step)
        kernels = [(self.clamps, "clamp"), (self.rotates, "rotate_pieces")]
        kernels += [(wanted, "normalize_pieces") for wanted in (self.q_norm, self.k_norm, self.v_norm)]
        kernels += [(self.kept_at is not None, "rotate_pieces")]
        yield from (step.part(kernel) for wanted, kernel in kernels if wanted)
        if self.indexer is not None and self.indexer.own is not None:
            yield from self.indexer.own.launches(step)
        if step.prompts:
            yield Launch("rope_append", self._jobs(step.card)[-2])

    def attention(self, step: Step) -> Iterator[Launch]:
        """The brick of the same name."""
        jobs, plan = self._jobs(step.card), attention_plan.decode_plan(self.shape, *step.card)
        if self.indexer is not None:
            yield from self.indexer.choice(step)
        if step.prompts:
            yield Launch("attention_prefill", jobs[-1])
        else:
            if step.appends_first:
                yield Launch("rope_append", jobs[2])
            if self.indexer is not None:
                yield Launch("rope_append", jobs[2])  # of rows that choose
            yield Launch("attention_decode", jobs[1 if plan.one_range_each(step.n_rows, step.most_rows) else 0])
        if self.indexer is not None:
            yield from self.indexer.attended(step)

    def result(self, step: Step) -> Iterator[Launch]:
        """The products of attn_output."""
        if self.latent is not None and self.latent.v_b is not None:
            yield from self.latent.v_b.launches(step)
        if self.gates:
            yield step.part("multiply_gate")
        if self.sub_norm:
            yield step.part("normalize_pieces")
        left = step.prompts and self.prompts_leave_operand and not step.gathered
        form = Input.OPERAND if left else Input.PLAIN
        yield from step.product(self.output, given=form, ready=self.leaves_operand and step.hands_over)

    def _jobs(self, card: Card) -> list[attention_plan.Job]:
        return attention_plan.build_jobs(self.shape, *card)


def attention_shape(config: AttentionConfig, kv_type: KvType, *, stretch: int = 1) -> AttentionShape:
    """The kernel shape of one layer's attention."""
    rope = None if rotates_apart(config) else config.rope
    return AttentionShape(
        heads=config.n_heads,
        kv_heads=config.n_kv_heads,
        key_dim=config.key_width,
        value_dim=config.value_width,
        rope_dim=0 if rope is None else rope.n_rot,
        rope_style=KernelRopeStyle.ADJACENT if rope is None else _ROPE_STYLES[rope.style],
        kv_type=kv_type,
        alibi=config.alibi > 0.0,
        # Without a rotated part a key has no number behind its value: values are cached apart.
        values_in_keys=config.values_in_keys and config.value_width < config.key_width,
        gate=-(-gate_columns(config) // ALIGNED) * ALIGNED if config.latent is None else 0,
        distances=FARTHEST if config.relative_buckets else 0,
        both_ways=not config.causal,
        stretch=stretch,
    )


def rotates_apart(config: AttentionConfig) -> bool:
    """Whether queries and keys are rotated before the attention kernels see them, which else do it themselves."""
    return config.latent is not None or config.qk_norm_after_rope


def folds_heads(config: AttentionConfig, weights: AttentionWeights) -> bool:
    """Whether the attention kernels norm queries and keys themselves, or there is nothing to norm."""
    if config.qk_norm is None:
        return True
    plain = config.qk_norm is QkNorm.HEAD and not config.qk_norm_after_rope
    return plain and folds(weights.q_norm) and folds(weights.k_norm)


def attention_inputs(weights: AttentionWeights) -> list[Linear]:
    """What attention multiplies the normed input with, in the order of a row: queries, keys, values, gates.

    Of a layer without keys and values of its own queries alone; then it has no gates.
    """
    if weights.k is None:
        assert weights.q is not None
        return [weights.q]
    q, k, v = weights.qkv
    if weights.query_gate is not None:
        q, gate = weights.query_gate
        return [q, k, v, gate]
    return [q, k, v, *(() if weights.gate is None else (weights.gate,))]


def describe_attention(
    config: AttentionConfig,
    weights: AttentionWeights,
    chooser: Chooser,
    *,
    kv_type: KvType,
    stretch: int,
    factor: float,
    kept_at: int | None = None,
) -> AttentionPlan:
    """Attention of one layer; what it adds to the stream is multiplied by factor.

    kept_at: see AttentionPlan. stretch: see AttentionShape.
    """
    latent = None
    if weights.latent is not None:
        latent = describe_latent(config, weights, weights.latent, chooser)
    folded = kept_at is None and folds_heads(config, weights)  # what is kept is normalized
    shape, indexer = attention_shape(config, kv_type, stretch=stretch), None
    if config.indexer is not None:
        indexer = describe_indexer(config.indexer, weights.indexer, shape, chooser, kv_type)
    output, gates = chooser.projection([weights.output], factor=factor), gate_columns(config)
    plain = latent is None and indexer is None and not gates and weights.sub_norm is None
    leaves = plain and output.takes_operand and attention_plan.decode_plan(shape, *chooser.card).leaves_operand
    takes = all(part.families.prompt is Family.PREFILL_GEMM for part in output.parts)
    prompts = plain and takes and attention_plan.prefill_plan(shape, chooser.card.arch).leaves_operand(shape)
    return AttentionPlan(
        shape=shape,
        qkv=None if latent is not None else chooser.projection(attention_inputs(weights)),
        latent=latent,
        output=output,
        clamps=config.clamp is not None,
        rotates=config.latent is None and rotates_apart(config),
        q_norm=not folded and weights.q_norm is not None,
        k_norm=not folded and weights.k_norm is not None,
        v_norm=weights.v_norm is not None and config.cache_layer is None,
        folds_norms=folded and weights.q_norm is not None,
        gates=gates,
        sub_norm=weights.sub_norm is not None,
        kept_at=kept_at,
        cache_layer=config.cache_layer,
        indexer=indexer,
        leaves_operand=leaves,
        prompts_leave_operand=prompts,
    )
