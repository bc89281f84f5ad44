"""Brings a model's tensors to the GPU, packed and grouped as its launch plan says.

Owns the way of every weight to the device. Must not decide what is launched together, and must not know of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.cuda.attention.attention import LayerAttention
from engine.cuda.attention.heads import HeadSteps
from engine.cuda.experts.heads import HeadProducts
from engine.cuda.experts.moe import ExpertProducts
from engine.cuda.experts.moe_rows import RowExperts
from engine.cuda.experts.prefill import StackedExperts
from engine.cuda.formats.layouts import kept_as
from engine.cuda.formats.repack import PackedMatrix, repack
from engine.cuda.launch_plan.attention import AttentionPlan, HeadMatrices, LatentPlan
from engine.cuda.launch_plan.families import Family
from engine.cuda.launch_plan.feed_forward import FfnPlan
from engine.cuda.launch_plan.mixture import MoePlan
from engine.cuda.launch_plan.model import LaunchPlan, LayerPlan
from engine.cuda.launch_plan.products import Matrix, Product, Projection
from engine.cuda.load.device_weights import (
    DeviceAttention,
    DeviceFfn,
    DeviceHeads,
    DeviceLatent,
    DeviceLayer,
    DeviceMoe,
    DeviceProduct,
    DeviceProjection,
    DeviceWeights,
)
from engine.cuda.load.tensor_index import TensorIndex
from engine.cuda.matrix.decode_gemm import DecodeGemm
from engine.cuda.matrix.linear import MatrixGroup
from engine.cuda.matrix.matvec import MatVec
from engine.cuda.rows.parts import NO_ROPE, DeviceNorm, DeviceRope
from engine.gguf.quants import dequantize
from engine.model.config import AttentionConfig, NormKind, RopeStyle
from engine.model.loader import LoadedModel
from engine.model.rope import RopeTable
from engine.model.weights import (
    AttentionWeights,
    FfnWeights,
    LatentWeights,
    LayerWeights,
    Linear,
    MoeWeights,
    Norm,
    Weight,
)


class Uploader:
    """Uploads tensors on one stream.

    Args:
        stream: a CuPy stream.
        progress: called with the bytes uploaded so far.
    """

    def __init__(self, stream: Any, progress: Callable[[int], None]) -> None:
        self._stream = stream
        self._progress = progress
        self._done = 0
        self._plan: LaunchPlan
        self._tensors: TensorIndex
        self._packed: dict[str, PackedMatrix] = {}
        self._vectors: dict[int, Any] = {}

    def model(self, model: LoadedModel, plan: LaunchPlan) -> DeviceWeights:
        """Uploads everything; returns once it is all packed."""
        config, weights = model.config, model.weights
        self._plan, self._tensors = plan, TensorIndex(weights)
        with self._stream:
            result = DeviceWeights(
                plan=plan,
                token_embd=self.matrix(weights.token_embd),
                embedding_scale=config.embedding_scale,
                position_embd=None if weights.position_embd is None else self.matrix(weights.position_embd),
                embedding_norm=self.norm(weights.embedding_norm),
                layers=tuple(self._layer(*pair) for pair in zip(plan.layers, weights.layers, strict=True)),
                output_norm=self.norm(weights.output_norm),
                output=self.projection(plan.output),
                logit_softcap=config.logit_softcap,
            )
        self._stream.synchronize()
        return result

    # ---- tensors ---------------------------------------------------------------------------------------------

    def norm(self, norm: Norm | None) -> DeviceNorm | None:
        """A norm on the device; None stays None."""
        if norm is None:
            return None
        weight, bias = (None if one is None else self.vector(one).reshape(-1) for one in (norm.weight, norm.bias))
        return DeviceNorm(norm.kind is NormKind.LAYER, norm.epsilon, weight, bias)

    def vector(self, values: np.ndarray | None, dtype: npt.DTypeLike = np.float32) -> Any:
        """A small array on the device; None stays None."""
        import cupy

        if values is None:
            return None
        key = id(values)
        if key not in self._vectors:
            self._vectors[key] = (cupy.asarray(np.ascontiguousarray(values, dtype=dtype)), values)
        return self._vectors[key][0]

    def matrix(self, weight: Weight, partner: Weight | None = None) -> PackedMatrix:
        """One matrix or one below the other all of a stack, packed; the same tensor is packed once."""
        key = weight.name if partner is None else f"{weight.name} {partner.name}"
        if key not in self._packed:
            rows = int(np.prod(weight.shape[:-1]))
            other = None if partner is None else self._raw(partner)
            self._packed[key] = repack(
                self._raw(weight), kept_as(weight.type), rows, weight.columns, partner=other, stream=self._stream
            )
        return self._packed[key]

    def _raw(self, weight: Weight) -> Any:
        import cupy

        raw = np.ascontiguousarray(weight.raw).reshape(-1)
        if kept_as(weight.type) is not weight.type:
            raw = dequantize(raw, weight.type).view(np.uint8)
        device = cupy.empty(raw.nbytes, cupy.uint8)
        device.set(raw, stream=self._stream)
        self._done += weight.raw.nbytes
        self._progress(self._done)
        return device

    def _rope(self, rope: RopeTable | None) -> DeviceRope:
        if rope is None:
            return NO_ROPE
        halves = rope.style is RopeStyle.NEOX
        return DeviceRope(int(rope.n_rot), halves, self.vector(rope.inv_freq, np.float64), rope.magnitude)

    # ---- products --------------------------------------------------------------------------------------------

    def projection(self, plan: Projection, expert: int | None = None) -> DeviceProjection:
        """The launches of a projection; of a stack, those of one expert."""
        parts = tuple(self.product(part, expert) for part in plan.parts)
        return DeviceProjection(parts, plan.width, plan.columns)

    def product(self, plan: Product, expert: int | None = None) -> DeviceProduct:
        """One launch; of a stack, that of one expert."""
        linears = [self._tensors.linear(one.tensor, expert) for one in plan.matrices]
        partner = plan.matrices[0].partner
        up = None if partner is None else self._tensors.linear(partner, expert).weight
        matrices = [self.matrix(linear.weight, up) for linear in linears]
        alpha = plan.alpha if expert is None else linears[0].scale
        return self._over(plan, matrices, self._bias(linears), alpha)

    def _over(self, plan: Product, matrices: Sequence[PackedMatrix], bias: Any, alpha: float) -> DeviceProduct:
        """The launchers that the plan asks for."""
        used = plan.families.used
        matvec = MatVec(matrices) if Family.MATVEC in used else None
        gemm = None
        if Family.DECODE_GEMM in used:
            gemm = DecodeGemm(matrices, self._plan.card.multiprocessors, plan.cut)
        return DeviceProduct(plan, matvec or MatrixGroup(matrices), matvec, gemm, bias, alpha)

    @staticmethod
    def _bias(group: Sequence[Linear]) -> Any:
        if all(linear.bias is None for linear in group):
            return None
        pieces = [
            np.zeros(linear.weight.rows, np.float32) if linear.bias is None else linear.bias / np.float32(linear.scale)
            for linear in group
        ]
        import cupy

        return cupy.asarray(np.concatenate(pieces).astype(np.float32))

    def _view(
        self, plan: Projection, stack: PackedMatrix, index: int, count: int, bias: Any = None
    ) -> DeviceProjection:
        """One matrix of a stack that is packed as a whole, as a projection."""
        (part,) = plan.parts
        product = self._over(part, [_part_of(stack, index, count)], bias, 1.0)
        return DeviceProjection((product,), plan.width, plan.columns)

    # ---- parts -----------------------------------------------------------------------------------------------

    def _layer(self, plan: LayerPlan, layer: LayerWeights) -> DeviceLayer:
        ffn = moe = None
        if isinstance(plan.ffn, MoePlan):
            assert layer.moe is not None
            moe = self._moe(plan.ffn, layer.moe)
        else:
            assert layer.ffn is not None
            ffn = self._ffn(plan.ffn, layer.ffn)
        return DeviceLayer(
            plan=plan,
            attn_norm=self.norm(layer.attn_norm),
            mixer=self._attention(plan.mixer, layer.config.attention, layer.attention),
            attn_post_norm=self.norm(layer.attn_post_norm),
            ffn_norm=self.norm(layer.ffn_norm),
            ffn=ffn,
            moe=moe,
            ffn_post_norm=self.norm(layer.ffn_post_norm),
            residual_scale=layer.config.residual_scale,
        )

    def _ffn(self, plan: FfnPlan, weights: FfnWeights, expert: int | None = None) -> DeviceFfn:
        return DeviceFfn(
            plan=plan,
            paired=None if plan.paired is None else self.product(plan.paired, expert),
            gate=None if plan.gate is None else self.projection(plan.gate, expert),
            up=None if plan.up is None else self.projection(plan.up, expert),
            down=self.projection(plan.down, expert),
            act_scales=self.vector(weights.act_scales),
        )

    def _attention(self, plan: AttentionPlan, config: AttentionConfig, weights: AttentionWeights) -> DeviceAttention:
        rotates = not plan.rotates and plan.latent is None  # in the attention kernels
        rope = weights.rope if rotates else None
        q_norm, k_norm = (self.norm(norm) if plan.folds_norms else None for norm in (weights.q_norm, weights.k_norm))
        temperature = config.temperature
        constants = LayerAttention(
            scale=config.scale,
            inv_freq=None if rope is None else self.vector(rope.inv_freq, np.float64),
            rope_scale=1.0 if rope is None else rope.magnitude,
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            norm_eps=1e-6 if q_norm is None else q_norm.epsilon,
            window=config.window or 0,
            temperature=0.0 if temperature is None else temperature.scale,
            temperature_length=1 if temperature is None else temperature.length,
            softcap=config.softcap or 0.0,
            sinks=self.vector(weights.sinks),
            slopes=self.vector(weights.alibi_slopes),
        )
        heads = None
        if plan.prepares:
            heads = HeadSteps(
                clamp=config.clamp,
                rope=self._rope(weights.rope) if plan.rotates else None,
                q_norm=self.norm(weights.q_norm) if plan.q_norm else None,
                k_norm=self.norm(weights.k_norm) if plan.k_norm else None,
                kind=config.qk_norm,
            )
        latent = None
        if plan.latent is not None:
            assert weights.latent is not None
            latent = self._latent(plan.latent, weights.latent, weights.rope)
        return DeviceAttention(
            plan=plan,
            qkv=None if plan.qkv is None else self.projection(plan.qkv),
            latent=latent,
            heads=heads,
            constants=constants,
            output=self.projection(plan.output),
        )

    def _latent(self, plan: LatentPlan, weights: LatentWeights, rope: RopeTable | None) -> DeviceLatent:
        kv_a_norm = self.norm(weights.kv_a_norm)
        assert kv_a_norm is not None
        return DeviceLatent(
            plan=plan,
            inputs=self.projection(plan.inputs),
            q_a_norm=self.norm(weights.q_a_norm),
            q_b=None if plan.q_b is None else self.projection(plan.q_b),
            kv_a_norm=kv_a_norm,
            k_b=None if plan.k_b is None else self._heads(plan.k_b),
            v_b=None if plan.v_b is None else self._heads(plan.v_b),
            kv_b=None if plan.kv_b is None else self.projection(plan.kv_b),
            rope=self._rope(rope),
        )

    def _heads(self, plan: HeadMatrices) -> DeviceHeads:
        n, alone = plan.heads, Projection((plan.single,), plan.single.width, plan.single.columns)
        if Family.HEADS not in plan.families.used:
            single = tuple(self.projection(alone, head) for head in range(n))
            return DeviceHeads(plan, single, None, sum(one.n_bytes for one in single))
        packed = self._stack(plan.stack)
        views = tuple(self._view(alone, packed, head, n) for head in range(n))
        joined = HeadProducts(packed, n, self._plan.settings.max_sequences)
        return DeviceHeads(plan, views, joined, int(packed.data.nbytes))

    def _moe(self, plan: MoePlan, weights: MoeWeights) -> DeviceMoe:
        n, selection_bias = plan.routing.n_experts, self.vector(weights.selection_bias)
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
            biases = {
                "router_bias": selection_bias, "gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias,
            }  # fmt: skip
            used = plan.families.used
            chosen = ExpertProducts(*parts, **biases) if Family.EXPERTS_CHOSEN in used else None
            sharing = RowExperts(*parts, **biases) if Family.EXPERTS_SHARED in used else None
            if Family.EXPERTS_GROUPED in used:
                stacks = MatrixGroup([gate_up]), MatrixGroup([down])
                grouped = StackedExperts(*stacks, plan.routing, selection_bias)
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
        )

    def _stack(self, plan: Matrix) -> PackedMatrix:
        stack = self._tensors.stack(plan.tensor).weight
        return self.matrix(stack, None if plan.partner is None else self._tensors.stack(plan.partner).weight)

    def _gathered(
        self, plan: FfnPlan, gate_up: PackedMatrix, down: PackedMatrix, biases: tuple[Any, ...], index: int, n: int
    ) -> DeviceFfn:
        """One expert as views of the stacks; biases: of gate, up and down, float32 (E, ...) or None."""
        gate_bias, up_bias, down_bias = (None if one is None else one[index] for one in biases)
        assert plan.paired is not None
        return DeviceFfn(
            plan=plan,
            paired=self._over(plan.paired, [_part_of(gate_up, index, n)], None, 1.0),
            gate=None,
            up=None,
            down=self._view(plan.down, down, index, n, down_bias),
            gate_bias=gate_bias,
            up_bias=up_bias,
        )


def _part_of(matrix: PackedMatrix, index: int, count: int) -> PackedMatrix:
    """One of `count` equal stacks of rows, each of whole tiles, as a view."""
    n_bytes = matrix.data.nbytes // count
    data = matrix.data[index * n_bytes : (index + 1) * n_bytes]
    return replace(matrix, rows=matrix.rows // count, data=data)
