"""A model's weights on the GPU: uploaded once, packed there for the kernels, grouped into the launches of a layer.

Owns all weight memory. Must not know of batches or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.cuda.attention.attention import AttentionShape, LayerAttention
from engine.cuda.attention.heads import HeadSteps
from engine.cuda.attention.latent import DeviceLatent
from engine.cuda.driver.compiler import device_arch
from engine.cuda.experts.moe import ExpertProducts, HeadProducts
from engine.cuda.experts.moe_rows import RowExperts
from engine.cuda.experts.prefill import StackedExperts
from engine.cuda.experts.router import Routing
from engine.cuda.formats.layouts import kept_as
from engine.cuda.formats.repack import PackedMatrix, repack
from engine.cuda.load.needs import (
    ACTIVATIONS,
    attention_shape,
    can_gather_experts,
    can_join_heads,
    can_pair,
    can_share_experts,
    can_stack_experts,
    expert_routing,
    folds_heads,
    latent_inputs,
    rotates_apart,
)
from engine.cuda.matrix.linear import Part, Projection
from engine.cuda.matrix.matvec import Activation, MatVec
from engine.cuda.rows.parts import NO_ROPE, DeviceNorm, DeviceRope
from engine.gguf.quants import dequantize
from engine.model.config import AttentionConfig, FfnConfig, MoeConfig, NormKind, RopeStyle
from engine.model.loader import LoadedModel
from engine.model.rope import RopeTable
from engine.model.weights import (
    AttentionWeights,
    ExpertLinear,
    FfnWeights,
    LatentWeights,
    LayerWeights,
    Linear,
    MoeWeights,
    Norm,
    Weight,
)


@dataclass(frozen=True, eq=False)
class DeviceFfn:
    """A feed-forward part.

    Attributes:
        paired: gate and up in one launch with the activation inside; None where biases, scales or types forbid it.
        gate: the gate alone where it is not paired; None in parts without a gate.
        up: the up projection where it is not paired.
        down: the down projection.
        activation: the non-linearity.
        width: columns of the hidden vector.
        act_scales: float32 (F,) that divides what the activation gives, or None.
        gate_bias: float32 (F,) of a paired matrix, or None. up_bias: likewise. Only products of prompts heed them.
    """

    paired: MatVec | None
    gate: Projection | None
    up: Projection | None
    down: Projection
    activation: Activation
    width: int
    act_scales: Any = None
    gate_bias: Any = None
    up_bias: Any = None

    @property
    def halves_apart(self) -> bool:
        """Whether something stands between the paired products and the activation, or that bends up as well."""
        biased = self.gate_bias is not None or self.up_bias is not None
        return biased or self.activation is Activation.SWIGLU_CLAMPED


@dataclass(frozen=True, eq=False)
class DeviceMoe:
    """A mixture of experts: router, one feed-forward part per expert, the shared one and its gate.

    routing: how a row chooses; selection_bias: float32 (E,) that joins the choice, or None.
    products: the experts' launches of a decode step, over the same memory; None where their types forbid it.
    sharing: the same where rows that chose an expert read it together; None where card or types forbid it.
    stacked: the experts for prompts, over the same memory; None where each is multiplied by itself.
    """

    routing: Routing
    selection_bias: Any
    router: Projection
    experts: tuple[DeviceFfn, ...]
    shared: DeviceFfn | None
    shared_gate: Projection | None
    products: ExpertProducts | None
    sharing: RowExperts | None
    stacked: StackedExperts | None


@dataclass(frozen=True, eq=False)
class DeviceLayer:
    """One layer on the device. Exactly one of ffn and moe is set, and one of qkv and latent.

    Norms may be None. residual_scale is part of the projections whose results are added as they come; it is left for
    those with a norm behind them.
    """

    index: int
    attn_norm: DeviceNorm | None
    qkv: Projection | None
    latent: DeviceLatent | None
    heads: HeadSteps | None
    shape: AttentionShape
    attention: LayerAttention
    output: Projection
    attn_post_norm: DeviceNorm | None
    ffn_norm: DeviceNorm | None
    ffn: DeviceFfn | None
    moe: DeviceMoe | None
    ffn_post_norm: DeviceNorm | None
    residual_scale: float
    parallel: bool


@dataclass(frozen=True, eq=False)
class DeviceWeights:
    """The whole model on the device. token_embd is the head's own matrix where the file ties them.

    logit_scale is part of the output projection.
    """

    token_embd: PackedMatrix
    embedding_scale: float
    position_embd: PackedMatrix | None
    embedding_norm: DeviceNorm | None
    layers: tuple[DeviceLayer, ...]
    output_norm: DeviceNorm | None
    output: Projection
    logit_softcap: float | None


class Uploader:
    """Brings tensors to the device and packs them, on one stream.

    Args:
        stream: a CuPy stream.
        progress: called with the bytes uploaded so far.
    """

    def __init__(self, stream: Any, progress: Callable[[int], None]) -> None:
        self._stream = stream
        self._progress = progress
        self._done = 0
        self._rows = 0
        self._packed: dict[str, PackedMatrix] = {}
        self._vectors: dict[int, Any] = {}

    def model(self, model: LoadedModel, cache_half: bool, max_sequences: int) -> DeviceWeights:
        """Uploads everything; returns once it is all packed. Decode steps will have at most max_sequences rows."""
        self._rows = max_sequences
        config, weights = model.config, model.weights
        with self._stream:
            result = DeviceWeights(
                token_embd=self.matrix(weights.token_embd),
                embedding_scale=config.embedding_scale,
                position_embd=None if weights.position_embd is None else self.matrix(weights.position_embd),
                embedding_norm=self.norm(weights.embedding_norm),
                layers=tuple(self._layer(layer, cache_half) for layer in weights.layers),
                output_norm=self.norm(weights.output_norm),
                output=self.projection([weights.output], factor=config.logit_scale),
                logit_softcap=config.logit_softcap,
            )
        self._stream.synchronize()
        return result

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

    def matrix(self, weight: Weight) -> PackedMatrix:
        """One matrix, packed; the same tensor is packed once."""
        key = f"{weight.name}"
        if key not in self._packed:
            self._packed[key] = repack(
                self._raw(weight), kept_as(weight.type), weight.rows, weight.columns, stream=self._stream
            )
        return self._packed[key]

    def projection(self, linears: Sequence[Linear], *, factor: float = 1.0) -> Projection:
        """Linear maps of one input as few launches as their scales allow; results are multiplied by factor."""
        parts: list[Part] = []
        column = 0
        together = all(linear.scale == 1.0 for linear in linears)
        for group in [list(linears)] if together else [[linear] for linear in linears]:
            matvec = MatVec([self.matrix(linear.weight) for linear in group])
            parts.append(Part(matvec, self._bias(group), group[0].scale * factor, column))
            column += matvec.width
        return Projection(tuple(parts), column, linears[0].weight.columns)

    def ffn(self, weights: FfnWeights, config: FfnConfig, *, factor: float = 1.0) -> DeviceFfn:
        """A feed-forward part times factor, gate and up in one launch where nothing stands between them."""
        gate, up = weights.gate, weights.up
        paired = None
        if gate is not None and can_pair(weights, config):
            packed = repack(
                self._raw(gate.weight),
                kept_as(gate.weight.type),
                gate.weight.rows,
                gate.weight.columns,
                partner=self._raw(up.weight),
                stream=self._stream,
            )
            paired = MatVec([packed])
        return DeviceFfn(
            paired=paired,
            gate=None if paired or gate is None else self.projection([gate]),
            up=None if paired else self.projection([up]),
            down=self.projection([weights.down], factor=factor),
            activation=ACTIVATIONS[config.activation],
            width=config.width,
            act_scales=self.vector(weights.act_scales),
        )

    def _bias(self, group: Sequence[Linear]) -> Any:
        if all(linear.bias is None for linear in group):
            return None
        pieces = [
            np.zeros(linear.weight.rows, np.float32) if linear.bias is None else linear.bias / np.float32(linear.scale)
            for linear in group
        ]
        import cupy

        return cupy.asarray(np.concatenate(pieces).astype(np.float32))

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

    def _layer(self, layer: LayerWeights, cache_half: bool) -> DeviceLayer:
        config, attention = layer.config.attention, layer.attention
        latent, scale = attention.latent, layer.config.residual_scale
        # What a norm stands behind is scaled after it.
        factors = [scale if norm is None else 1.0 for norm in (layer.attn_post_norm, layer.ffn_post_norm)]
        return DeviceLayer(
            index=layer.index,
            attn_norm=self.norm(layer.attn_norm),
            qkv=None if latent is not None else self.projection(list(attention.qkv)),
            latent=None if latent is None else self._latent(config, attention, latent),
            heads=self._heads(layer),
            shape=attention_shape(config, cache_half),
            attention=self._attention(layer),
            output=self.projection([attention.output], factor=factors[0]),
            attn_post_norm=self.norm(layer.attn_post_norm),
            ffn_norm=self.norm(layer.ffn_norm),
            ffn=None if layer.ffn is None else self._dense(layer, factors[1]),
            moe=None if layer.moe is None else self._moe(layer, factors[1]),
            ffn_post_norm=self.norm(layer.ffn_post_norm),
            residual_scale=scale,
            parallel=layer.parallel,
        )

    def _attention(self, layer: LayerWeights) -> LayerAttention:
        config, attention = layer.config.attention, layer.attention
        rope = None if rotates_apart(config) else attention.rope
        folded = attention.q_norm is not None and folds_heads(layer)
        q_norm, k_norm = (self.norm(norm) if folded else None for norm in (attention.q_norm, attention.k_norm))
        temperature = config.temperature
        return LayerAttention(
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
            sinks=self.vector(attention.sinks),
            slopes=self.vector(attention.alibi_slopes),
        )

    def _heads(self, layer: LayerWeights) -> HeadSteps | None:
        """What row kernels do to queries and keys; None where there is nothing."""
        config, attention = layer.config.attention, layer.attention
        folded = folds_heads(layer)
        apart = config.latent is None and rotates_apart(config)
        if config.clamp is None and folded and not apart:
            return None
        return HeadSteps(
            clamp=config.clamp,
            rope=self._rope(attention.rope) if apart else None,
            q_norm=None if folded else self.norm(attention.q_norm),
            k_norm=None if folded else self.norm(attention.k_norm),
            kind=config.qk_norm,
        )

    def _rope(self, rope: RopeTable | None) -> DeviceRope:
        if rope is None:
            return NO_ROPE
        halves = rope.style is RopeStyle.NEOX
        return DeviceRope(int(rope.n_rot), halves, self.vector(rope.inv_freq, np.float64), rope.magnitude)

    def _latent(self, config: AttentionConfig, attention: AttentionWeights, weights: LatentWeights) -> DeviceLatent:
        assert config.latent is not None
        kv_a_norm = self.norm(weights.kv_a_norm)
        assert kv_a_norm is not None

        k_b, k_heads = self._head_matrices(weights.k_b)
        v_b, v_heads = self._head_matrices(weights.v_b)
        return DeviceLatent(
            config=config.latent,
            heads=config.n_heads,
            inputs=self.projection(latent_inputs(weights)),
            q_a_norm=self.norm(weights.q_a_norm),
            q_b=None if weights.q_b is None else self.projection([weights.q_b]),
            kv_a_norm=kv_a_norm,
            k_b=k_b,
            v_b=v_b,
            k_heads=k_heads,
            v_heads=v_heads,
            kv_b=None if weights.kv_b is None else self.projection([weights.kv_b]),
            rope=self._rope(attention.rope),
        )

    def _head_matrices(self, heads: ExpertLinear | None) -> tuple[tuple[Projection, ...], HeadProducts | None]:
        """A matrix for every head: one by one, and all at once over the same memory where their type allows it."""
        if heads is None:
            return (), None
        weight, n = heads.weight, heads.weight.shape[0]
        if not can_join_heads(heads):
            return tuple(self.projection([heads.expert(h)]) for h in range(n)), None
        packed = repack(self._raw(weight), weight.type, n * weight.rows, weight.columns, stream=self._stream)
        parts = [Part(MatVec([_part_of(packed, h, n)]), None, 1.0, 0) for h in range(n)]
        single = tuple(Projection((part,), weight.rows, weight.columns) for part in parts)
        return single, HeadProducts(packed, n, self._rows)

    def _dense(self, layer: LayerWeights, factor: float) -> DeviceFfn:
        assert layer.ffn is not None and isinstance(layer.config.ffn, FfnConfig)
        return self.ffn(layer.ffn, layer.config.ffn, factor=factor)

    def _moe(self, layer: LayerWeights, factor: float) -> DeviceMoe:
        moe, config = layer.moe, layer.config.ffn
        assert moe is not None
        assert isinstance(config, MoeConfig)
        routing, selection_bias = expert_routing(config, factor), self.vector(moe.selection_bias)
        products = sharing = stacked = None
        if can_gather_experts(moe, config):
            experts, products, sharing, stacked = self._gathered(moe, config, routing)
        else:
            experts = tuple(self.ffn(moe.expert(i), config.expert) for i in range(config.n_experts))
        shared = None
        if moe.shared is not None and config.shared is not None:
            shared = self.ffn(moe.shared, config.shared, factor=factor)
        return DeviceMoe(
            routing=routing,
            selection_bias=selection_bias,
            router=self.projection([moe.router]),
            experts=experts,
            shared=shared,
            shared_gate=None if moe.shared_gate is None else self.projection([moe.shared_gate]),
            products=products,
            sharing=sharing,
            stacked=stacked,
        )

    def _gathered(
        self, moe: MoeWeights, config: MoeConfig, routing: Routing
    ) -> tuple[tuple[DeviceFfn, ...], ExpertProducts, RowExperts | None, StackedExperts | None]:
        """All experts of a layer as two packed matrices, and every expert as views of them."""
        assert moe.gate is not None
        n, width, columns = config.n_experts, config.expert.width, moe.gate.weight.columns
        gate_up = repack(
            self._raw(moe.gate.weight),
            kept_as(moe.gate.weight.type),
            n * width,
            columns,
            partner=self._raw(moe.up.weight),
            stream=self._stream,
        )
        down = repack(
            self._raw(moe.down.weight), kept_as(moe.down.weight.type), n * columns, width, stream=self._stream
        )
        activation, selection_bias = ACTIVATIONS[config.expert.activation], self.vector(moe.selection_bias)
        gate_bias, up_bias, down_bias = (self.vector(part.bias) for part in (moe.gate, moe.up, moe.down))

        def row(biases: Any, index: int) -> Any:
            return None if biases is None else biases[index]

        experts = tuple(
            DeviceFfn(
                paired=MatVec([_part_of(gate_up, i, n)]),
                gate=None,
                up=None,
                down=Projection((Part(MatVec([_part_of(down, i, n)]), row(down_bias, i), 1.0, 0),), columns, width),
                activation=activation,
                width=width,
                gate_bias=row(gate_bias, i),
                up_bias=row(up_bias, i),
            )
            for i in range(n)
        )
        stacked = None
        if can_stack_experts(moe, config, device_arch()):
            stacked = StackedExperts(MatVec([gate_up]), MatVec([down]), routing, selection_bias)
        parts = gate_up, down, routing, activation
        biases = {"router_bias": selection_bias, "gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
        sharing = RowExperts(*parts, **biases) if can_share_experts(moe, config, device_arch()) else None
        return experts, ExpertProducts(*parts, **biases), sharing, stacked


def _part_of(matrix: PackedMatrix, index: int, count: int) -> PackedMatrix:
    """One of `count` equal stacks of rows, each of whole tiles, as a view."""
    n_bytes = matrix.data.nbytes // count
    data = matrix.data[index * n_bytes : (index + 1) * n_bytes]
    return replace(matrix, rows=matrix.rows // count, data=data)
