"""Latent attention in the plan: its products in front of the cache, and the matrices of heads.

Letters: H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.cuda.experts.heads import can_multiply_heads, head_job
from engine.cuda.launch_plan.families import Families, Family
from engine.cuda.launch_plan.parts.norms import norm_of
from engine.cuda.launch_plan.products import Chooser, Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Launch, Norm, Step
from engine.model.config import AttentionConfig, LatentConfig, OutputGate
from engine.model.weights import AttentionWeights, ExpertLinear, LatentWeights, Linear


@dataclass(frozen=True)
class HeadMatrices:
    """A matrix for every head, multiplied with that head's part of a row.

    Attributes:
        single: one of them, as prompts multiply it.
        stack: all of them, one below the other.
        families: HEADS for decode steps where the types allow it.
    """

    single: Product
    stack: Matrix
    families: Families

    @property
    def heads(self) -> int:
        """H."""
        return self.stack.count

    def launches(self, step: Step) -> Iterator[Launch]:
        """The products of all heads."""
        if self.at_once(step):
            job = head_job(self.stack.type, self.heads, step.card.arch)
            yield Launch("moe_down", job, Family.HEADS, (self.stack.tensor,))
            return
        alone = Projection((self.single,), self.single.width, self.single.columns)
        for _ in range(self.heads):
            yield from step.product(alone)

    def at_once(self, step: Step) -> bool:
        """Whether one launch multiplies all heads."""
        return self.families.family_for(step.n_rows, step.phase) is Family.HEADS


@dataclass(frozen=True)
class LatentPlan:
    """Latent attention before the cache; see engine.model.config.LatentConfig.

    Attributes:
        config: widths.
        heads: H.
        inputs: gates, if there are any, queries or their compression, the latent vector, the shared rotated part.
        gate: columns of the gates.
        q_a_norm: whether the compression is normalized. k_norm: whether the rotated part is.
        q_b, kv_b: later products, or None. k_b, v_b: matrices of the heads, or None.
    """

    config: LatentConfig
    heads: int
    inputs: Projection
    gate: int
    q_a_norm: bool
    k_norm: bool
    q_b: Projection | None
    kv_b: Projection | None
    k_b: HeadMatrices | None
    v_b: HeadMatrices | None

    def products(self) -> Iterator[Product]:
        """All products; of head matrices one."""
        for projection in (self.inputs, self.q_b, self.kv_b):
            if projection is not None:
                yield from projection.parts
        for heads in (self.k_b, self.v_b):
            if heads is not None:
                yield heads.single

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        for projection in (self.inputs, self.q_b, self.kv_b):
            if projection is not None:
                yield from (matrix for part in projection.parts for matrix in part.matrices)
        yield from (heads.stack for heads in (self.k_b, self.v_b) if heads is not None)

    def launches(self, step: Step) -> Iterator[Launch]:
        """From the products of norm(x) to queries, keys and values as the attention kernels read them."""
        yield from step.product(self.inputs)
        if self.q_b is not None:
            if self.q_a_norm:
                yield step.part("normalize_pieces")
            yield from step.product(self.q_b)
        if self.k_norm:
            yield step.part("normalize_pieces")
        if self.kv_b is None:
            assert self.k_b is not None
            for kernel in ("normalize_pieces", "normalize_pieces", "rotate_pieces"):
                yield step.part(kernel)
            copied = self.k_b.at_once(step)
            if copied:
                yield step.part("rotate_pieces")
            yield from self.k_b.launches(step)
            if copied:
                yield step.part("rotate_pieces")
            yield step.part("rotate_pieces")
            return
        yield step.part("normalize_pieces")
        yield from step.product(self.kv_b)
        for _ in range(4 + self.heads):
            yield step.part("rotate_pieces")


def gate_columns(config: AttentionConfig) -> int:
    """Gates of a token."""
    if config.output_gate is None:
        return 0
    width = config.value_width if config.latent is None else config.latent.value_width
    return config.n_heads * (1 if config.output_gate is OutputGate.PER_HEAD else width)


def latent_inputs(weights: AttentionWeights) -> list[Linear]:
    """What latent attention multiplies the normed input with: gates, queries or their compression, and kv_a."""
    latent = weights.latent
    assert latent is not None
    queries = latent.q if latent.q is not None else latent.q_a
    assert queries is not None
    return [*(() if weights.gate is None else (weights.gate,)), queries, latent.kv_a]


def describe_latent(
    config: AttentionConfig, attention: AttentionWeights, weights: LatentWeights, chooser: Chooser
) -> LatentPlan:
    """The latent attention of one layer, whose weights these are."""
    assert config.latent is not None
    return LatentPlan(
        config=config.latent,
        heads=config.n_heads,
        inputs=chooser.projection(latent_inputs(attention)),
        gate=gate_columns(config),
        k_norm=weights.k_norm is not None,
        q_a_norm=norm_of(weights.q_a_norm) is not Norm.ABSENT,
        q_b=None if weights.q_b is None else chooser.projection([weights.q_b]),
        kv_b=None if weights.kv_b is None else chooser.projection([weights.kv_b]),
        k_b=_describe_heads(weights.k_b, chooser),
        v_b=_describe_heads(weights.v_b, chooser),
    )


def _describe_heads(heads: ExpertLinear | None, chooser: Chooser) -> HeadMatrices | None:
    if heads is None:
        return None
    weight = heads.weight
    plain = heads.scale is None and heads.bias is None
    joined = plain and can_multiply_heads(weight.type, weight.rows, weight.shape[0])
    (single,) = chooser.one_of(heads, decodes=not joined, bias=heads.bias is not None).parts
    decode = ((1, Family.HEADS),) if joined else single.families.decode
    return HeadMatrices(single, Matrix.of(weight, stacked=True), Families(single.families.prompt, decode))
