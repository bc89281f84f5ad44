"""Mixtures of experts: the router's product, the experts that rows choose or all of them, and the shared part.

Must not know of mixers, requests or sampling.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.experts import adjugate, router
from engine.cuda.experts.token_experts import keep_named
from engine.cuda.launch_plan.families import Family
from engine.cuda.launch_plan.parts.mixture import AdjugatePlan
from engine.cuda.load.device_weights import DeviceLayer, DeviceMoe
from engine.cuda.rows import parts
from engine.cuda.rows import rows as row_ops
from engine.cuda.rows.parts import DeviceNorm
from engine.cuda.step.bricks.skips import SkipBricks
from engine.cuda.step.folding import Hidden, Read, Shared, columns_of, folded


class MoeInputs(NamedTuple):
    """What a mixture reads: its experts, its shared part, and the router's scores (T, routing.n_scores).

    then: the norm of what reads the stream next, whose operand is left; None: none is.
    """

    experts: Read
    shared: Read
    scores: DeviceArray
    then: DeviceNorm | None


class MixtureBricks(SkipBricks):
    """The feed-forward part of layers with experts."""

    def ffn_moe(self, layer: DeviceLayer, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        """See LayerBricks.ffn_moe; y is what attn_output gave.

        Rows go to the experts they chose; where the card or the types forbid it, every expert multiplies all rows.
        """
        moe, post, n = layer.moe, layer.ffn_post_norm, self.n_rows
        assert moe is not None
        plan, scores, skip = moe.plan, self._scores_of(moe), layer.ffn_skip
        if skip is not None:
            self._read_skip(skip, x)
        family = plan.families.family_for(n, self.step.phase)
        if plan.reads_input:
            read = Read(self.buffers.beside[:n], None)
            if not plan.routed_early:
                self._score(moe, read, scores)
            shared = read if moe.shared is None else Read(*self._normed(x, layer.ffn_norm))
        elif plan.router_norm is not None:
            self._score(moe, Read(*self._normed(x, moe.router_norm)), scores)
            read, shared = Read(*self._normed(x, moe.norm)), Read(*self._normed(x, layer.ffn_norm))
        else:
            read = shared = Read(*self._normed(x, layer.ffn_norm))
            if not plan.routed_early:
                self._score(moe, read, scores)
        gathers = family is not Family.EXPERTS_EVERY or moe.latent is not None  # or x is not what experts read
        apart = post is not None or skip is not None or plan.sums_apart
        target = x if gathers and not apart else columns_of(self.buffers.total, n, int(x.shape[1]))
        if apart:
            parts.clear(target)
        elif not gathers:  # the sum goes beside x, which every expert still reads
            row_ops.copy(x, target)
        then = self._norm_behind(layer) if layer.plan.leaves_behind and self.step.hands_over else None
        self._mixture(moe, family, MoeInputs(read, shared, scores, then), target)
        if skip is not None:
            self._begin_skip(skip, x)
        if post is not None:
            parts.normalize(target, x, post, scale=layer.residual_scale, add=True)
        elif apart:
            row_ops.add_scaled(x, target, None, 0)
        elif not gathers:
            row_ops.copy(target, x)
        return self._joined(layer, x, y)

    def _scores_of(self, moe: DeviceMoe) -> DeviceArray:
        """Where the router's scores (T, routing.n_scores) are."""
        return columns_of(self.buffers.router, self.n_rows, moe.plan.routing.n_scores)

    def _score(self, moe: DeviceMoe, read: Read, scores: DeviceArray) -> None:
        """The router's product; of experts that a token does not name, where it names them, minus infinity."""
        self._multiply_router(moe, read, scores)
        if moe.token_experts is not None:
            keep_named(scores, self._tokens, moe.token_experts, moe.plan.routing.n_experts)

    def _multiply_router(self, moe: DeviceMoe, read: Read, scores: DeviceArray) -> None:
        if moe.plan.score_family(self.n_rows, self.step.phase) is not Family.ROUTER:
            self._product(moe.router, read.x, scores, norm=read.norm)
            return
        (part,), (weight, eps) = moe.router.parts, folded(read.norm)
        (matrix,) = part.group.matrices
        together = moe.plan.scores_together(self.step)
        router.score_experts(
            matrix, read.x, scores, bias=part.bias, alpha=part.alpha, norm=weight, eps=eps, together=together
        )

    def _mixture(self, moe: DeviceMoe, family: Family, inputs: MoeInputs, out: DeviceArray) -> None:
        """Adds chosen experts and the shared one to out, which may be x if rows go to their own experts."""
        given = out
        if moe.latent is not None:
            read, given = self._latent_rows(moe)
            self._product(moe.latent.down, inputs.experts.x, read, norm=inputs.experts.norm)
            parts.clear(given)
            inputs = inputs._replace(experts=Read(read, None))
        if family is Family.EXPERTS_EVERY:
            self._every_expert(moe, inputs, given)
            shared = self._shared_hidden(moe, inputs)  # uses the memory that the experts have used
        else:
            shared = self._own_experts(moe, family, inputs, given)
        if moe.plan.adjugate is not None:
            self._add_adjugates(moe, moe.plan.adjugate, family, inputs.scores, given)
        if moe.latent is not None:
            norm = moe.latent.norm
            if norm is not None and not norm.folds:
                parts.normalize(given, given, norm)
                norm = None
            self._product(moe.latent.up, given, out, norm=norm, add=True)
        if moe.expert_post_norm is not None:
            parts.normalize(out, out, moe.expert_post_norm)
        if shared is not None:
            self._add_shared(moe, *shared, out)

    def _add_adjugates(
        self, moe: DeviceMoe, plan: AdjugatePlan, family: Family, scores: DeviceArray, out: DeviceArray
    ) -> None:
        """Adds to out, what the experts have given, the adjugate experts that read it."""
        buffers, n, routing, config = self.buffers, self.n_rows, moe.plan.routing, plan.config
        ids = columns_of(buffers.chosen, n, routing.n_used)
        weights = columns_of(buffers.chosen_weights, n, routing.n_used)
        if family is not Family.EXPERTS_EVERY:
            router.route(routing, scores, ids, weights, bias=moe.selection_bias)
        best, each = min(config.n_used, routing.n_used), config.per_group
        adjugate.weigh_groups(scores, ids, weights, best=best, per_group=each, scale=config.scale)
        given, part = columns_of(buffers.given, n, int(out.shape[1])), columns_of(buffers.y, n, int(out.shape[1]))
        row_ops.copy(out, given)
        for index, expert in enumerate(moe.adjugates):
            self._product(expert.down, self._gate_up(expert, given, None), part)
            parts.add_chosen(out, part, ids, weights, index)

    def _latent_rows(self, moe: DeviceMoe) -> tuple[DeviceArray, DeviceArray]:
        """What latent experts read, and what they give, (T, L) each."""
        n, width, flat = self.n_rows, moe.plan.columns, self.buffers.latent.reshape(-1)
        read, given = flat[: n * width], flat[n * width : 2 * n * width]
        return read.reshape(n, width), given.reshape(n, width)

    @abstractmethod
    def _norm_behind(self, layer: DeviceLayer) -> DeviceNorm | None:
        """The norm of what reads the stream behind a layer."""

    @abstractmethod
    def _own_experts(self, moe: DeviceMoe, family: Family, inputs: MoeInputs, out: DeviceArray) -> Shared | None:
        """Adds to out the experts that each row chose; returns _shared_hidden(), which reads x before it changes."""

    def _every_expert(self, moe: DeviceMoe, inputs: MoeInputs, out: DeviceArray) -> None:
        buffers, n, routing, (x, norm) = self.buffers, self.n_rows, moe.plan.routing, inputs.experts
        ids = columns_of(buffers.chosen, n, routing.n_places)
        weights = columns_of(buffers.chosen_weights, n, routing.n_places)
        router.route(routing, inputs.scores, ids, weights, bias=moe.selection_bias)
        part, on_inputs = columns_of(buffers.y, n, int(out.shape[1])), moe.plan.weigh_input
        normed, weighed = buffers.normed[:n], buffers.part[:n]
        if on_inputs and norm is not None:
            parts.normalize(x, normed, norm)
        elif on_inputs and x.data.ptr != normed.data.ptr:
            row_ops.copy(x, normed)
        for index, expert in enumerate(moe.experts):
            if on_inputs:
                parts.weigh_chosen_rows(normed, weighed, ids, weights, index)
            h = self._gate_up(expert, *((weighed, None) if on_inputs else (x, norm)))
            self._product(expert.down, h, part)
            parts.add_chosen(out, part, ids, None if on_inputs else weights, index)

    def _shared_hidden(self, moe: DeviceMoe, inputs: MoeInputs) -> Shared | None:
        """Hidden values of a shared part of its own, and its score (T, >= 1), in the first column; None without one."""
        if moe.shared is None:
            return None
        read, score, routing = inputs.shared, None, moe.plan.routing
        if routing.shared_scored:
            score = inputs.scores[:, routing.n_experts :]
        elif moe.shared_gate is not None:
            score = self.buffers.mix[: self.n_rows]
            self._product(moe.shared_gate, read.x, score, norm=read.norm)
        return self._gate_up(moe.shared, *read), score

    def _add_shared(self, moe: DeviceMoe, h: Hidden, score: DeviceArray | None, out: DeviceArray) -> None:
        assert moe.shared is not None
        if score is None and moe.shared_post_norm is None:
            self._product(moe.shared.down, h, out, add=True)
            return
        y = columns_of(self.buffers.y, self.n_rows, int(out.shape[1]))
        self._product(moe.shared.down, h, y)
        if moe.shared_post_norm is not None:
            assert score is None
            parts.normalize(y, out, moe.shared_post_norm, add=True)
        else:
            assert score is not None
            row_ops.add_gated(out, y, score)
