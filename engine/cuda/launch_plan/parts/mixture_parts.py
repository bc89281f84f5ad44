"""How a mixture of experts is planned: what is stacked below each other, and which kernels multiply it.

Letters: E experts, U experts that a row chooses, D width, F width of an expert.
"""

from __future__ import annotations

from dataclasses import replace

from engine.cuda.experts import moe, moe_rows, prefill
from engine.cuda.experts.router import MAX_EXPERTS, MAX_USED, Gating, KernelRouting, can_score
from engine.cuda.formats.layouts import kept_as
from engine.cuda.launch_plan.families import Families, Family
from engine.cuda.launch_plan.parts.feed_forward import (
    can_fuse_experts,
    describe_expert,
    describe_ffn,
    describe_gathered_expert,
    fuses,
    is_unscaled,
)
from engine.cuda.launch_plan.parts.mixture import AdjugatePlan, LatentExpertPlan, MoePlan
from engine.cuda.launch_plan.parts.norms import norm_of
from engine.cuda.launch_plan.products import Chooser, Matrix, Product
from engine.cuda.matrix import gemm_plan
from engine.model.config import MoeConfig, Routing
from engine.model.weights import MoeWeights, Weight

_GATINGS = {
    Routing.SOFTMAX: Gating.SOFTMAX,
    Routing.SIGMOID: Gating.SIGMOID,
    Routing.SOFTMAX_CHOSEN: Gating.SOFTMAX_OF_CHOSEN,
    Routing.SQRT_SOFTPLUS: Gating.SQRT_SOFTPLUS,
}


def expert_routing(config: MoeConfig, factor: float = 1.0) -> KernelRouting:
    """The routing of a layer as the kernels take it; the chosen weights are multiplied by `factor` as well."""
    return KernelRouting(
        n_experts=config.n_experts,
        n_used=config.n_used,
        gating=_GATINGS[config.routing],
        groups=config.n_groups,
        groups_used=config.n_groups_used,
        normalize=config.normalize,
        weight_scale=config.weight_scale * factor,
    )


def can_gather(weights: MoeWeights, config: MoeConfig) -> bool:
    """Whether a decode step reads the chosen experts only; else every expert multiplies every row."""
    gate, up, down = weights.gate, weights.up, weights.down
    if gate is None:
        return False
    plain = all(is_unscaled(part) for part in (gate, up, down))
    types = kept_as(gate.weight.type), kept_as(up.weight.type)
    return fuses(config.expert) and plain and moe.can_gather(*types, config.expert.width, gate.weight.columns)


def stacked_shared(weights: MoeWeights, config: MoeConfig) -> int:
    """How many experts of the stack the shared part is: more of them, which every row uses; 0: a part of its own.

    It is as wide as so many experts together, of their types and with their activation, and reads what they read; its
    score, if it has one, is a row of the router. What it gives is added as it is, but for a factor.
    """
    shared, width = weights.shared, config.expert.width
    if shared is None or config.shared is None or shared.gate is None or not can_gather(weights, config):
        return 0
    if config.shared.width % width or replace(config.shared, width=width) != config.expert:
        return 0
    experts, parts = (weights.gate, weights.up, weights.down), (shared.gate, shared.up, shared.down)
    apart = config.separate_norms or config.reads_input or weights.shared_post_norm is not None
    apart = apart or weights.latent is not None or weights.adjugate is not None
    if apart or shared.act_scales is not None or shared.sub_norm is not None:
        return 0
    for expert, part in zip(experts, parts, strict=True):
        if expert is None or expert.bias is not None or part.bias is not None:
            return 0
        if kept_as(expert.weight.type) is not kept_as(part.weight.type):
            return 0
    if not shared.gate.scale == shared.up.scale == 1.0 or width % kept_as(shared.down.weight.type).block_size:
        return 0
    score = weights.shared_gate
    if score is not None and not joins_router(weights, config):
        return 0
    count = config.shared.width // width
    fits = config.n_used + count <= MAX_USED and config.n_experts + count <= MAX_EXPERTS
    weighed = score is None and shared.down.scale == 1.0
    return count if fits and (weighed or not config.weights_inputs) else 0


def joins_router(weights: MoeWeights, config: MoeConfig) -> bool:
    """Whether the score of the shared part is one more row of the router: both read the same, and are alike."""
    score, router = weights.shared_gate, weights.router
    if (
        score is None
        or config.routed_early
        or config.reads_input
        or config.separate_norms
        or config.adjugate is not None
    ):
        return False
    plain = all(one.bias is None and one.scale == 1.0 for one in (score, router))
    return plain and kept_as(score.weight.type) is kept_as(router.weight.type)


def describe_moe(weights: MoeWeights, config: MoeConfig, chooser: Chooser, *, factor: float = 1.0) -> MoePlan:
    """A mixture of experts times factor."""
    gate, up, down = weights.gate, weights.up, weights.down
    n_shared, shared, shared_gate = stacked_shared(weights, config), weights.shared, weights.shared_gate
    latent, weighed = None, factor
    if weights.latent is not None:
        both = chooser.projection([weights.latent.down]), chooser.projection([weights.latent.up], factor=factor)
        latent, weighed = LatentExpertPlan(*both, norm_of(weights.latent.norm)), 1.0
    gathered = can_gather(weights, config)
    stacks: tuple[Product | None, Product | None] = (None, None)
    families = Families(Family.EXPERTS_EVERY, ((1, Family.EXPERTS_EVERY),))
    if gathered:
        assert gate is not None
        expert = describe_gathered_expert(gate, up, down, config.expert, chooser)
        families = _gathered_families(weights, config, chooser)
        behind: list[tuple[Weight, ...]] = [(), ()]
        if n_shared:
            assert shared is not None and shared.gate is not None
            behind = [(shared.gate.weight, shared.up.weight), (shared.down.weight,)]
        pair = Matrix.of(gate.weight, up.weight, stacked=True, behind=behind[0])
        second = Matrix.of(down.weight, stacked=True, behind=behind[1])
        stacks = (
            Product((pair,), families, activation=expert.activation, bias=gate.bias is not None),
            Product((second,), families, bias=down.bias is not None),
        )
    else:
        expert = describe_expert(gate, up, down, config.expert, chooser)
    apart, score, routing = None, None, expert_routing(config, weighed)
    router = chooser.projection([weights.router])
    if shared is not None and n_shared:
        routing = replace(routing, n_shared=n_shared, shared_scale=shared.down.scale * factor)
    elif shared is not None and config.shared is not None:
        apart = describe_ffn(shared, config.shared, chooser, factor=factor)
    if shared_gate is not None and joins_router(weights, config):
        routing, router = replace(routing, shared_scored=True), chooser.with_rows(weights.router, shared_gate)
    elif shared_gate is not None:
        score = chooser.projection([shared_gate])
    adjugates = None
    if weights.adjugate is not None and config.adjugate is not None:
        own = weights.adjugate
        assert factor == 1.0, "what adjugate experts read is not scaled"
        one = describe_expert(own.gate, own.up, own.down, config.adjugate.expert, chooser)
        adjugates = AdjugatePlan(config.adjugate, one, own.up.weight.shape[0])
    (scores,) = router.parts
    return MoePlan(
        routing=routing,
        router=router,
        families=families,
        expert=expert,
        gate_up=stacks[0],
        down=stacks[1],
        shared=apart,
        shared_gate=score,
        scores_alone=can_score(scores.types[0], scores.columns),
        columns=up.weight.columns,
        weigh_input=config.weights_inputs,
        routed_early=config.routed_early,
        reads_input=config.reads_input,
        router_norm=norm_of(weights.router_norm) if config.separate_norms else None,
        expert_norm=norm_of(weights.norm) if config.separate_norms else None,
        expert_post_norm=weights.expert_post_norm is not None,
        shared_post_norm=weights.shared_post_norm is not None,
        latent=latent,
        adjugate=adjugates,
        by_token=config.by_token,
    )


def _gathered_families(weights: MoeWeights, config: MoeConfig, chooser: Chooser) -> Families:
    assert weights.gate is not None
    types = kept_as(weights.gate.weight.type), kept_as(weights.down.weight.type)
    width, columns, arch = config.expert.width, weights.up.weight.columns, chooser.card.arch
    stacks = (
        arch == gemm_plan.ARCH
        and can_fuse_experts(weights.gate, weights.up, weights.down, config.expert)
        and all(gemm_plan.supports(type) for type in types)
        and prefill.can_stack(width, columns, config.n_experts)
    )
    decode = [(1, Family.EXPERTS_CHOSEN)]
    if not chooser.deterministic:
        if moe_rows.can_share(*types, width, columns, arch):
            decode.append((moe_rows.SHARING_ROWS, Family.EXPERTS_SHARED))
        if stacks:
            decode.append((prefill.GROUPED_ROWS, Family.EXPERTS_GROUPED))
    return Families(Family.EXPERTS_GROUPED if stacks else Family.EXPERTS_EVERY, tuple(decode))
