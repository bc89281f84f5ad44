"""Mixtures of experts in the plan: the router, which kernels multiply the experts, and the expert of every row.

Letters: E experts, U experts that a row chooses, D width, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.cuda.experts import adjugate, moe, moe_rows, prefill, token_experts
from engine.cuda.experts.router import KernelRouting, can_score_together, route_job, router_job
from engine.cuda.launch_plan.families import Families, Family, Phase
from engine.cuda.launch_plan.parts.feed_forward import FfnPlan
from engine.cuda.launch_plan.parts.skips import SkipPlan
from engine.cuda.launch_plan.products import Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Launch, Norm, Step
from engine.cuda.matrix import decode_gemm_plan
from engine.model.config import AdjugateConfig

_MANY_ROWS = frozenset({Family.EXPERTS_SHARED, Family.EXPERTS_GROUPED})


@dataclass(frozen=True)
class LatentExpertPlan:
    """What experts read and give where that is not as wide as the model.

    Attributes:
        down: to L numbers. up: back, of the experts' sum. norm: where the norm of that sum is computed.
    """

    down: Projection
    up: Projection
    norm: Norm


@dataclass(frozen=True)
class AdjugatePlan:
    """Small experts that groups of experts share; every one of them multiplies all rows.

    Attributes:
        config: how many, and how they are chosen.
        expert: one of them; the others are alike. count: their number.
    """

    config: AdjugateConfig
    expert: FfnPlan
    count: int

    def launches(self, step: Step) -> Iterator[Launch]:
        """Behind the routing."""
        yield Launch("adjugate_weights", (adjugate.FILES, None))
        yield step.row("copy_rows")
        for _ in range(self.count):
            yield from self.expert.hidden(step)
            yield from self.expert.result(step)
            yield step.part("add_chosen")


@dataclass(frozen=True)
class MoePlan:
    """A mixture of experts.

    Attributes:
        routing: how a row chooses; the weights are multiplied by the factor of the part.
        router: the scores.
        families: of the experts.
        expert: one expert as a part of its own; the others are alike.
        gate_up, down: all experts as two packed matrices; None where decode steps multiply by every expert.
        shared: the expert of every row where it is not one of those in gate_up and down, behind the E that rows choose
            from (routing.n_shared), or None. shared_gate: its score, if that is no row of the router
            (routing.shared_scored), or None.
        scores_alone: whether ROUTER takes the router.
        columns: D, or L where the experts are latent. latent: their products, or None. adjugate: experts that
            read what the others have given, or None.
        weigh_input: a row's weights multiply what its experts read, not what they give.
        routed_early: the scores are those of the layer's input, before its mixer.
        reads_input: router and experts read the layer's input, normalized before the mixer.
        router_norm, expert_norm: where the norms of what these read are computed; None: they read the layer's normed
            stream, as the shared part does.
        expert_post_norm, shared_post_norm: whether what these give is normalized.
        by_token: a row's token names its experts; the scores weigh them.
    """

    routing: KernelRouting
    router: Projection
    families: Families
    expert: FfnPlan
    gate_up: Product | None
    down: Product | None
    shared: FfnPlan | None
    shared_gate: Projection | None
    scores_alone: bool
    columns: int
    weigh_input: bool = False
    routed_early: bool = False
    reads_input: bool = False
    router_norm: Norm | None = None
    expert_norm: Norm | None = None
    expert_post_norm: bool = False
    shared_post_norm: bool = False
    latent: LatentExpertPlan | None = None
    adjugate: AdjugatePlan | None = None
    by_token: bool = False

    @property
    def sums_apart(self) -> bool:
        """Whether the experts' sum is changed before it is added to the stream."""
        return self.expert_post_norm or self.shared_post_norm or self.adjugate is not None

    @property
    def uses_experts_alone(self) -> bool:
        """Whether some step multiplies with single experts."""
        return Family.EXPERTS_EVERY in self.families.used

    def score_family(self, n_rows: int, phase: Phase) -> Family:
        """The kernels of the router."""
        product = self.router.parts[0].family_for(n_rows, phase)
        few = self.families.family_for(n_rows, phase) not in _MANY_ROWS
        # Other kernels of float32 routers are slower: MATVEC takes 8 rows a launch.
        if phase is Phase.DECODE and self.scores_alone and (few or product is not Family.DECODE_GEMM):
            return Family.ROUTER
        return product

    def scores_together(self, step: Step) -> bool:
        """Whether ROUTER multiplies several rows at a time, where experts do so as well.

        A float32 router of 128 x 2048 on an H200, microseconds for 4, 8, 16, 64, 256 rows: one by one 2.7, 3.7, 6.0,
        13.3, 43; together 3.8, 4.1, 4.2, 4.4, 9.4.
        """
        (scores,) = self.router.parts
        many = self.families.family_for(step.n_rows, step.phase) in _MANY_ROWS
        return many and can_score_together(scores.types[0], scores.columns, step.card.arch)

    @property
    def emits(self) -> bool:
        """Whether its last launch can leave the stream as the operand of DECODE_GEMM, where steps hand over."""
        rows = decode_gemm_plan.FEW_ROWS + 1, decode_gemm_plan.MAX_ROWS
        together = all(self.families.family_for(n) is Family.EXPERTS_SHARED for n in rows)
        return together and self.shared is None and self.latent is None and not self.sums_apart

    def gathers(self, n_rows: int, phase: Phase) -> bool:
        """Whether rows go to the experts that they chose only."""
        return self.families.family_for(n_rows, phase) is not Family.EXPERTS_EVERY

    def products(self) -> Iterator[Product]:
        """All products; those of the experts once, also where prompts multiply them grouped."""
        yield from self.router.parts
        if self.latent is not None:
            yield from (*self.latent.down.parts, *self.latent.up.parts)
        yield from self.expert.products()
        if self.adjugate is not None:
            yield from self.adjugate.expert.products()
        if self.shared is not None:
            yield from self.shared.products()
        if self.shared_gate is not None:
            yield from self.shared_gate.parts

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        for product in self.products():
            yield from (matrix for matrix in product.matrices if matrix.tensor not in self._of_experts)
        stacks = [product for product in (self.gate_up, self.down) if product is not None]
        for product in stacks or self.expert.products():
            yield from (replace(matrix, count=self.routing.n_stacked) for matrix in product.matrices)
        if self.adjugate is not None:
            matrices = (matrix for product in self.adjugate.expert.products() for matrix in product.matrices)
            yield from (replace(matrix, count=self.adjugate.count) for matrix in matrices)

    @property
    def _of_experts(self) -> frozenset[str]:
        experts = [self.expert, *(() if self.adjugate is None else (self.adjugate.expert,))]
        products = (product for expert in experts for product in expert.products())
        return frozenset(matrix.tensor for product in products for matrix in product.matrices)

    def widths(self) -> dict[str, int]:
        """What it needs of the activations, by the fields of Widths."""
        shared = 0 if self.shared is None else self.shared.width
        routing = self.routing
        return {
            "ffn": max(self.expert.width, shared, 0 if self.adjugate is None else self.adjugate.expert.width),
            "given": 0 if self.adjugate is None else self.columns,
            "experts": routing.n_scores,
            "used": routing.n_places,
            "hidden": routing.n_places * self.expert.width,
            "latent": 0 if self.latent is None else self.columns,
        }

    def room_bytes(self, prompt_rows: int, decode_rows: int) -> int:
        """Scratch memory of the experts for prompts and decode steps of so many rows, one at a time."""
        shape = self.routing, self.expert.width, self.columns
        sizes = [0]
        if Family.EXPERTS_GROUPED in self.families.used:
            sizes.append(prefill.room_bytes(max(prompt_rows, decode_rows), *shape))
        if Family.EXPERTS_SHARED in self.families.used:
            sizes.append(moe_rows.room_bytes(decode_rows, *shape))
        return max(sizes)

    # ---- launches --------------------------------------------------------------------------------------------

    def launches(self, step: Step, *, norm: Norm, post: bool, skip: SkipPlan | None = None) -> Iterator[Launch]:
        """Everything from the part's norm to the sum.

        Args:
            step: the step.
            norm: of the layer.
            post: a norm comes behind the sum.
            skip: what skips the part, where that is more than the stream.
        """
        read = norm if self.expert_norm is None else self.expert_norm
        if self.reads_input:
            read = Norm.ABSENT
        if not self.routed_early:
            yield from self.scores(step, read if self.router_norm is None else self.router_norm)
        if self.routed_early or self.router_norm is not None:
            yield from step.norm(read)
        if self.shared is not None and (self.reads_input or self.expert_norm is not None):
            yield from step.norm(norm)
        beside = not self.gathers(step.n_rows, step.phase) and self.latent is None
        apart = post or skip is not None or self.sums_apart
        if apart:
            yield step.part("clear")
        elif beside:
            yield step.row("copy_rows")
        if self.latent is None:
            yield from self._mixture(step, read)
            if self.adjugate is not None:
                if self.gathers(step.n_rows, step.phase):
                    yield Launch("route_top", route_job(self.routing), self._family(step))
                yield from self.adjugate.launches(step)
        else:
            yield from step.product(self.latent.down)
            yield step.part("clear")
            yield from self._mixture(step, Norm.ABSENT)
            yield from step.norm(self.latent.norm)
            yield from step.product(self.latent.up)
        if self.expert_post_norm:
            yield step.part("normalize_pieces")
        if self.shared is not None:
            yield from self.shared.result(step)
            if self.shared_post_norm:
                yield step.part("normalize_pieces")
            elif self.shared_gate is not None or self.routing.shared_scored:
                yield step.row("add_gated")
        if skip is not None:
            yield from skip.begin(step)
        if apart and not post:
            yield step.row("add_scaled")
        elif post:
            yield step.part("normalize_pieces")
        elif beside:
            yield step.row("copy_rows")

    def scores(self, step: Step, norm: Norm) -> Iterator[Launch]:
        """The router, and the norm of what it reads."""
        yield from step.norm(norm)
        if self.score_family(step.n_rows, step.phase) is Family.ROUTER:
            (scores,) = self.router.parts
            job, kernel = (
                router_job(scores.types[0], step.card.arch),
                "router_rows" if self.scores_together(step) else "router",
            )
            yield Launch(kernel, job, Family.ROUTER, scores.matrices[0].tensors)
        else:
            yield from step.product(self.router)
        if self.by_token:
            yield Launch("keep_named", (token_experts.FILES, None))

    def _mixture(self, step: Step, read: Norm) -> Iterator[Launch]:
        """Experts and the hidden values of the shared part. read: norm of what the experts read."""
        family = self._family(step)
        route = Launch("route_top", route_job(self.routing), family)
        if family is Family.EXPERTS_EVERY:
            yield route
            if self.weigh_input and read is not Norm.APART:
                yield step.part("normalize_pieces") if read is Norm.FOLDED else step.row("copy_rows")
            for _ in range(self.routing.n_stacked):
                if self.weigh_input:
                    yield step.part("weigh_chosen_rows")
                yield from self.expert.hidden(step)
                yield from self.expert.result(step)
                yield step.part("add_chosen")
            yield from self._shared_hidden(step)
            return
        assert self.gate_up is not None
        assert self.down is not None
        types, arch = (self.gate_up.types[0], self.down.types[0]), step.card.arch
        (first_stack,), (second_stack,) = self.gate_up.matrices, self.down.matrices
        activation, widths = self.expert.activation, (self.expert.width, self.columns)
        if family is Family.EXPERTS_CHOSEN:
            first, second, _ = moe.build_jobs(*types, activation, self.routing, arch, *widths)
            yield Launch("moe_gate_up", first, family, first_stack.tensors)
            yield from self._shared_hidden(step)
            yield Launch("moe_down", second, family, second_stack.tensors)
            return
        yield from self._shared_hidden(step)
        if family is Family.EXPERTS_SHARED:
            first, second, begin, _ = moe_rows.build_jobs(*types, activation, self.routing, *widths)
            for _ in range(0, step.n_rows, moe_rows.MAX_ROWS):
                yield route
                yield Launch("moe_rows_begin", begin, family)
                yield Launch("moe_rows_gate_up", first, family, first_stack.tensors)
                yield Launch("moe_rows_down", second, family, second_stack.tensors)
                yield Launch("moe_rows_end", begin, family)
            return
        (group,) = prefill.build_jobs()
        tile = prefill.expert_tile(step.n_rows, self.routing)
        yield route
        yield Launch("group_rows", group, family)
        yield step.operand()
        yield from step.gemm(self.gate_up, tile=tile)
        yield from step.gemm(replace(self.down, activation=activation), tile=tile)
        yield Launch("add_experts", group, family)

    def _family(self, step: Step) -> Family:
        return self.families.family_for(step.n_rows, step.phase)

    def _shared_hidden(self, step: Step) -> Iterator[Launch]:
        if self.shared is None:
            return
        if self.shared_gate is not None:
            yield from step.product(self.shared_gate)
        yield from self.shared.hidden(step)
