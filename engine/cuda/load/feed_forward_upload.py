"""Brings feed-forward parts and mixtures of experts to the GPU. Must not know of steps."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.experts.moe import ExpertProducts
from engine.cuda.experts.moe_rows import RowExperts
from engine.cuda.experts.prefill import StackedExperts
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.launch_plan.families import Family
from engine.cuda.launch_plan.parts.feed_forward import FfnPlan
from engine.cuda.launch_plan.parts.mixture import AdjugatePlan, LatentExpertPlan, MoePlan
from engine.cuda.load.device_weights import DeviceFfn, DeviceLatentExperts, DeviceMoe
from engine.cuda.load.tensor_upload import TensorUploader, part_of
from engine.cuda.matrix.linear import MatrixGroup
from engine.model.weights import FfnWeights, MoeWeights


class ExpertBiases(TypedDict):
    """Keyword arguments of the launchers of experts; biases are float32, or None for none."""

    router_bias: DeviceArray | None
    gate_bias: DeviceArray | None
    up_bias: DeviceArray | None
    down_bias: DeviceArray | None
    weigh_input: bool


class FeedForwardUploader(TensorUploader):
    """Uploads feed-forward parts."""

    def _ffn(self, plan: FfnPlan, weights: FfnWeights, expert: int | None = None) -> DeviceFfn:
        return DeviceFfn(
            plan=plan,
            paired=None if plan.paired is None else self.product(plan.paired, expert),
            gate=None if plan.gate is None else self.projection(plan.gate, expert),
            up=None if plan.up is None else self.projection(plan.up, expert),
            down=self.projection(plan.down, expert),
            act_scales=self.vector(weights.act_scales),
            sub_norm=self.norm(weights.sub_norm),
        )

    def _moe(self, plan: MoePlan, weights: MoeWeights) -> DeviceMoe:
        n, selection_bias = plan.routing.n_stacked, None if plan.by_token else self.vector(weights.selection_bias)
        experts: tuple[DeviceFfn, ...] = ()
        chosen, sharing, grouped = None, None, None
        if plan.gate_up is None or plan.down is None:
            experts = tuple(self._ffn(plan.expert, weights.expert(index), index) for index in range(n))
            expert_bytes = sum(one.gate_up_bytes + one.down.n_bytes for one in experts)
        else:
            gate_up, down = (self._stack(*product.matrices) for product in (plan.gate_up, plan.down))
            expert_bytes = int(gate_up.data.nbytes + down.data.nbytes)
            assert weights.gate is not None
            gate_bias, up_bias, down_bias = (self.vector(one.bias) for one in (weights.gate, weights.up, weights.down))
            parts = gate_up, down, plan.routing, plan.expert.activation
            biases: ExpertBiases = {
                "router_bias": selection_bias, "gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias,
                "weigh_input": plan.weigh_input,
            }  # fmt: skip
            used = plan.families.used
            chosen = ExpertProducts(*parts, **biases) if Family.EXPERTS_CHOSEN in used else None
            sharing = RowExperts(*parts, **biases) if Family.EXPERTS_SHARED in used else None
            if Family.EXPERTS_GROUPED in used:
                stacks = MatrixGroup([gate_up]), MatrixGroup([down])
                grouped = StackedExperts(*stacks, plan.routing, selection_bias, plan.weigh_input)
            if plan.uses_experts_alone:
                vectors = gate_bias, up_bias, down_bias
                experts = tuple(self._gathered(plan.expert, gate_up, down, vectors, i, n) for i in range(n))
        return DeviceMoe(
            plan=plan,
            selection_bias=selection_bias,
            router=self.projection(plan.router),
            experts=experts,
            shared=None if plan.shared is None or weights.shared is None else self._ffn(plan.shared, weights.shared),
            shared_gate=None if plan.shared_gate is None else self.projection(plan.shared_gate),
            chosen=chosen,
            sharing=sharing,
            grouped=grouped,
            expert_bytes=expert_bytes,
            norm=self.norm(weights.norm),
            router_norm=self.norm(weights.router_norm),
            expert_post_norm=self.norm(weights.expert_post_norm),
            shared_post_norm=self.norm(weights.shared_post_norm),
            adjugates=self._adjugates(plan.adjugate, weights),
            token_experts=self.vector(weights.token_experts, np.int32) if plan.by_token else None,
            latent=None if plan.latent is None else self._latent_experts(plan.latent, weights),
        )

    def _adjugates(self, plan: AdjugatePlan | None, weights: MoeWeights) -> tuple[DeviceFfn, ...]:
        if plan is None or weights.adjugate is None:
            return ()
        own = weights.adjugate
        return tuple(self._ffn(plan.expert, own.expert(index), index) for index in range(plan.count))

    def _latent_experts(self, plan: LatentExpertPlan, weights: MoeWeights) -> DeviceLatentExperts:
        assert weights.latent is not None
        norm = self.norm(weights.latent.norm)
        return DeviceLatentExperts(self.projection(plan.down), self.projection(plan.up), norm)

    def _gathered(
        self,
        plan: FfnPlan,
        gate_up: PackedMatrix,
        down: PackedMatrix,
        biases: tuple[DeviceArray | None, ...],
        index: int,
        n: int,
    ) -> DeviceFfn:
        """One expert as views of the stacks; biases: of gate, up and down, float32 (E, ...) or None."""
        gate_bias, up_bias, down_bias = (None if one is None else one[index] for one in biases)
        assert plan.paired is not None
        return DeviceFfn(
            plan=plan,
            paired=self._over(plan.paired, [part_of(gate_up, index, n)], None, 1.0),
            gate=None,
            up=None,
            down=self._view(plan.down, down, index, n, down_bias),
            gate_bias=gate_bias,
            up_bias=up_bias,
        )
