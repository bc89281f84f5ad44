"""A model's weights on the GPU: uploaded once, packed there for the kernels, grouped into the launches of a layer.

Owns all weight memory. Must not know of batches or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.cuda import gemm
from engine.cuda.attention import AttentionShape, LayerAttention, RopeStyle
from engine.cuda.experts import StackedExperts, can_stack, room_bytes
from engine.cuda.layouts import LAYOUTS
from engine.cuda.matvec import Activation, MatVec
from engine.cuda.module import device_arch
from engine.cuda.moe import MAX_USED, ExpertProducts, Routing, can_gather
from engine.cuda.moe import build_jobs as expert_jobs
from engine.cuda.repack import PackedMatrix, check_supported, repack
from engine.gguf.types import GGMLType
from engine.model.config import Activation as ModelActivation
from engine.model.config import AttentionConfig, FfnConfig, MoeConfig
from engine.model.config import RopeStyle as ModelRopeStyle
from engine.model.loader import LoadedModel
from engine.model.weights import FfnWeights, LayerWeights, Linear, MoeWeights, Norm, Weight

ACTIVATIONS = {ModelActivation.SILU: Activation.SILU, ModelActivation.GELU: Activation.GELU_TANH}
_ROPE_STYLES = {ModelRopeStyle.NORM: RopeStyle.ADJACENT, ModelRopeStyle.NEOX: RopeStyle.HALVES}


@dataclass(frozen=True, eq=False)
class Part:
    """Matrices that one launch multiplies with one input: out = alpha * (W x + bias), at `column` of the output.

    Attributes:
        matvec: the launch.
        bias: float32 (width,) on the device, already divided by alpha; None for none.
        alpha: factor of the result.
        column: first output column.
    """

    matvec: MatVec
    bias: Any
    alpha: float
    column: int


@dataclass(frozen=True, eq=False)
class Projection:
    """One or several linear maps of the same input, outputs side by side.

    Attributes:
        parts: launches.
        width: output columns.
        columns: input columns.
    """

    parts: tuple[Part, ...]
    width: int
    columns: int


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
    """

    paired: MatVec | None
    gate: Projection | None
    up: Projection | None
    down: Projection
    activation: Activation
    width: int


@dataclass(frozen=True, eq=False)
class DeviceMoe:
    """A mixture of experts: router, one feed-forward part per expert, the shared one and its gate.

    products: the experts' launches of a decode step, over the same memory; None where their types forbid it.
    stacked: the experts for prompts, over the same memory; None where each is multiplied by itself.
    """

    config: MoeConfig
    router: Projection
    experts: tuple[DeviceFfn, ...]
    shared: DeviceFfn | None
    shared_gate: Projection | None
    products: ExpertProducts | None
    stacked: StackedExperts | None


@dataclass(frozen=True, eq=False)
class DeviceLayer:
    """One layer on the device; norms are float32 (D,). Exactly one of ffn and moe is set."""

    index: int
    attn_norm: Any
    qkv: Projection
    shape: AttentionShape
    attention: LayerAttention
    output: Projection
    ffn_norm: Any
    ffn: DeviceFfn | None
    moe: DeviceMoe | None
    parallel: bool = False


@dataclass(frozen=True, eq=False)
class DeviceWeights:
    """The whole model on the device. token_embd is the head's own matrix where the file ties them."""

    token_embd: PackedMatrix
    layers: tuple[DeviceLayer, ...]
    output_norm: Any
    output: Projection
    epsilon: float


def attention_shape(config: AttentionConfig, cache_half: bool) -> AttentionShape:
    """The kernel shape of one layer's attention."""
    rope = config.rope
    return AttentionShape(
        heads=config.n_heads,
        kv_heads=config.n_kv_heads,
        key_dim=config.key_width,
        value_dim=config.value_width,
        rope_dim=0 if rope is None else rope.n_rot,
        rope_style=RopeStyle.ADJACENT if rope is None else _ROPE_STYLES[rope.style],
        cache_half=cache_half,
    )


def check_types(model: LoadedModel) -> None:
    """Raises UnsupportedModelError where a matrix has a type without GPU kernels; needs no GPU."""
    for info in model.gguf.tensors.values():
        if len(info.shape) > 1:
            check_supported(info.type, f"tensor {info.name}")


def can_pair(weights: FfnWeights) -> bool:
    """Whether gate and up go in one launch: nothing stands between the products and the activation."""
    gate, up = weights.gate, weights.up
    if gate is None or gate.weight.type != up.weight.type:
        return False
    return all(part.bias is None and part.scale == 1.0 for part in (gate, up))


def kernel_groups(
    model: LoadedModel, *, prompts: bool = False
) -> list[tuple[list[tuple[GGMLType, int]], int, bool, Activation]]:
    """Every kind of launch the uploader will make: (type, rows) of its matrices, columns, paired, activation.

    Needs no GPU: kernels can be built while the weights are still on their way.

    Args:
        model: the model.
        prompts: also the experts that decode steps gather with kernels of their own.
    """
    groups: list[tuple[list[tuple[GGMLType, int]], int, bool, Activation]] = []

    def add(linears: Sequence[Linear]) -> None:
        together = all(linear.scale == 1.0 for linear in linears)
        for group in [list(linears)] if together else [[linear] for linear in linears]:
            shapes = [(linear.weight.type, linear.weight.rows) for linear in group]
            groups.append((shapes, group[0].weight.columns, False, Activation.NONE))

    def add_ffn(weights: FfnWeights, config: FfnConfig) -> None:
        if can_pair(weights):
            shape = [(weights.up.weight.type, weights.up.weight.rows)]
            groups.append((shape, weights.up.weight.columns, True, ACTIVATIONS[config.activation]))
        else:
            add([weights.up])
            if weights.gate is not None:
                add([weights.gate])
        add([weights.down])

    for layer in model.weights.layers:
        attention, moe, config = layer.attention, layer.moe, layer.config.ffn
        add(list(attention.qkv))
        add([attention.output])
        if layer.ffn is not None:
            assert isinstance(config, FfnConfig)
            add_ffn(layer.ffn, config)
        if moe is not None:
            assert isinstance(config, MoeConfig)
            add([moe.router])
            if prompts or not can_gather_experts(moe, config):
                add_ffn(moe.expert(0), config.expert)
            if moe.shared is not None and config.shared is not None:
                add_ffn(moe.shared, config.shared)
            if moe.shared_gate is not None:
                add([moe.shared_gate])
    add([model.weights.output])
    return groups


def moe_jobs(model: LoadedModel) -> list[tuple[tuple[str, ...], dict[str, object]]]:
    """The build jobs of the expert kernels of a model, for module.prebuild."""
    jobs = []
    for layer in model.weights.layers:
        moe, config = layer.moe, layer.config.ffn
        if moe is not None and isinstance(config, MoeConfig) and can_gather_experts(moe, config):
            types = moe.up.weight.type, moe.down.weight.type
            jobs += expert_jobs(*types, ACTIVATIONS[config.expert.activation], expert_routing(config))
    return jobs


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
        self._packed: dict[str, PackedMatrix] = {}
        self._vectors: dict[int, Any] = {}

    def model(self, model: LoadedModel, cache_half: bool) -> DeviceWeights:
        """Uploads everything; returns once it is all packed."""
        weights = model.weights
        with self._stream:
            token_embd = self.matrix(weights.token_embd)
            layers = tuple(self._layer(layer, cache_half) for layer in weights.layers)
            result = DeviceWeights(
                token_embd=token_embd,
                layers=layers,
                output_norm=self.norm(weights.output_norm),
                output=self.projection([weights.output]),
                epsilon=weights.output_norm.epsilon,
            )
        self._stream.synchronize()
        return result

    def norm(self, norm: Norm | None) -> Any:
        """The weight of a norm; models with norms of another kind are declined (features.py)."""
        assert norm is not None
        assert norm.weight is not None
        return self.vector(norm.weight)

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
            self._packed[key] = repack(self._raw(weight), weight.type, weight.rows, weight.columns, stream=self._stream)
        return self._packed[key]

    def projection(self, linears: Sequence[Linear]) -> Projection:
        """Linear maps of one input as few launches as their scales allow."""
        parts: list[Part] = []
        column = 0
        together = all(linear.scale == 1.0 for linear in linears)
        for group in [list(linears)] if together else [[linear] for linear in linears]:
            matvec = MatVec([self.matrix(linear.weight) for linear in group])
            parts.append(Part(matvec, self._bias(group), group[0].scale, column))
            column += matvec.width
        return Projection(tuple(parts), column, linears[0].weight.columns)

    def ffn(self, weights: FfnWeights, config: FfnConfig) -> DeviceFfn:
        """A feed-forward part, gate and up in one launch where nothing stands between them."""
        gate, up = weights.gate, weights.up
        paired = None
        if gate is not None and can_pair(weights):
            packed = repack(
                self._raw(gate.weight),
                gate.weight.type,
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
            down=self.projection([weights.down]),
            activation=ACTIVATIONS[config.activation],
            width=config.width,
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

        device = cupy.empty(weight.raw.nbytes, cupy.uint8)
        device.set(np.ascontiguousarray(weight.raw).reshape(-1), stream=self._stream)
        self._done += weight.raw.nbytes
        self._progress(self._done)
        return device

    def _layer(self, layer: LayerWeights, cache_half: bool) -> DeviceLayer:
        config, attention = layer.config.attention, layer.attention
        rope = attention.rope
        temperature = config.temperature
        return DeviceLayer(
            index=layer.index,
            attn_norm=self.norm(layer.attn_norm),
            qkv=self.projection(list(attention.qkv)),
            shape=attention_shape(config, cache_half),
            attention=LayerAttention(
                scale=config.scale,
                inv_freq=None if rope is None else self.vector(rope.inv_freq, np.float64),
                rope_scale=1.0 if rope is None else rope.magnitude,
                q_norm=None if attention.q_norm is None else self.norm(attention.q_norm),
                k_norm=None if attention.k_norm is None else self.norm(attention.k_norm),
                norm_eps=1e-6 if attention.q_norm is None else attention.q_norm.epsilon,
                window=config.window or 0,
                temperature=0.0 if temperature is None else temperature.scale,
                temperature_length=1 if temperature is None else temperature.length,
            ),
            output=self.projection([attention.output]),
            ffn_norm=self.norm(layer.ffn_norm),
            ffn=None if layer.ffn is None else self._dense(layer),
            moe=None if layer.moe is None else self._moe(layer),
        )

    def _dense(self, layer: LayerWeights) -> DeviceFfn:
        assert layer.ffn is not None
        assert isinstance(layer.config.ffn, FfnConfig)
        return self.ffn(layer.ffn, layer.config.ffn)

    def _moe(self, layer: LayerWeights) -> DeviceMoe:
        moe, config = layer.moe, layer.config.ffn
        assert moe is not None
        assert isinstance(config, MoeConfig)
        products = stacked = None
        if can_gather_experts(moe, config):
            experts, products, stacked = self._gathered(moe, config)
        else:
            experts = tuple(self.ffn(moe.expert(i), config.expert) for i in range(config.n_experts))
        shared = None
        if moe.shared is not None and config.shared is not None:
            shared = self.ffn(moe.shared, config.shared)
        return DeviceMoe(
            config=config,
            router=self.projection([moe.router]),
            experts=experts,
            shared=shared,
            shared_gate=None if moe.shared_gate is None else self.projection([moe.shared_gate]),
            products=products,
            stacked=stacked,
        )

    def _gathered(
        self, moe: MoeWeights, config: MoeConfig
    ) -> tuple[tuple[DeviceFfn, ...], ExpertProducts, StackedExperts | None]:
        """All experts of a layer as two packed matrices, and every expert as views of them."""
        assert moe.gate is not None
        n, width, columns = config.n_experts, config.expert.width, moe.gate.weight.columns
        gate_up = repack(
            self._raw(moe.gate.weight),
            moe.gate.weight.type,
            n * width,
            columns,
            partner=self._raw(moe.up.weight),
            stream=self._stream,
        )
        down = repack(self._raw(moe.down.weight), moe.down.weight.type, n * columns, width, stream=self._stream)
        activation = ACTIVATIONS[config.expert.activation]
        experts = tuple(
            DeviceFfn(
                paired=MatVec([_part_of(gate_up, i, n)]),
                gate=None,
                up=None,
                down=Projection((Part(MatVec([_part_of(down, i, n)]), None, 1.0, 0),), columns, width),
                activation=activation,
                width=width,
            )
            for i in range(n)
        )
        routing = expert_routing(config)
        stacked = None
        if can_stack_experts(moe, config, device_arch()):
            stacked = StackedExperts(MatVec([gate_up]), MatVec([down]), routing)
        return experts, ExpertProducts(gate_up, down, routing, activation), stacked


def _part_of(matrix: PackedMatrix, index: int, count: int) -> PackedMatrix:
    """One of `count` equal stacks of rows, each of whole tiles, as a view."""
    n_bytes = matrix.data.nbytes // count
    data = matrix.data[index * n_bytes : (index + 1) * n_bytes]
    return replace(matrix, rows=matrix.rows // count, data=data)


def expert_routing(config: MoeConfig) -> Routing:
    """The routing of a layer as the kernels take it."""
    return Routing(
        n_experts=config.n_experts,
        n_used=config.n_used,
        normalize=config.normalize,
        weight_scale=config.weight_scale,
    )


def can_gather_experts(moe: MoeWeights, config: MoeConfig) -> bool:
    """Whether a decode step reads the chosen experts only; else every expert runs over every row."""
    gate, up, down = moe.gate, moe.up, moe.down
    if gate is None:
        return False
    plain = all(part.bias is None and part.scale is None for part in (gate, up, down))
    width, columns = config.expert.width, gate.weight.columns
    return (
        plain
        and config.n_used <= MAX_USED
        and can_gather(gate.weight.type, up.weight.type, width, columns)
        and down.weight.type in LAYOUTS
    )


def can_stack_experts(moe: MoeWeights, config: MoeConfig, arch: int) -> bool:
    """Whether rows of prompts are multiplied by the experts they chose only; else by every expert."""
    if arch != gemm.ARCH or not can_gather_experts(moe, config):
        return False
    assert moe.gate is not None
    types = moe.gate.weight.type, moe.down.weight.type
    width, columns = config.expert.width, moe.gate.weight.columns
    return all(gemm.supports(type) for type in types) and can_stack(width, columns, config.n_experts)


def stacked_layers(model: LoadedModel, arch: int) -> list[tuple[MoeWeights, MoeConfig]]:
    """The mixtures of experts of a model that can_stack_experts(); needs no GPU."""
    found = []
    for layer in model.weights.layers:
        moe, config = layer.moe, layer.config.ffn
        if moe is not None and isinstance(config, MoeConfig) and can_stack_experts(moe, config, arch):
            found.append((moe, config))
    return found


def expert_room(model: LoadedModel, rows: int, arch: int) -> int:
    """Bytes of scratch memory that prompts of so many rows need for their experts."""
    return max(
        (
            room_bytes(rows, expert_routing(config), config.expert.width, model.config.width)
            for _, config in stacked_layers(model, arch)
        ),
        default=0,
    )
