"""What a model asks of the kernels, from its configuration and the types of its tensors: shapes, launches, build jobs.

Needs no GPU, so that kernels can be built while the weights are still on their way.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.cuda.attention.attention_plan import AttentionShape, RopeStyle
from engine.cuda.experts import moe_rows
from engine.cuda.experts.moe import build_jobs as expert_jobs
from engine.cuda.experts.moe import can_gather, can_multiply_heads, head_job
from engine.cuda.experts.prefill import can_stack, room_bytes
from engine.cuda.experts.router import Gating, Routing, can_score, route_job, router_job
from engine.cuda.formats.layouts import kept_as
from engine.cuda.matrix import gemm
from engine.cuda.matrix.matvec import Activation
from engine.gguf.types import GGMLType
from engine.model.config import Activation as ModelActivation
from engine.model.config import AttentionConfig, FfnConfig, MoeConfig, NormKind, QkNorm
from engine.model.config import RopeStyle as ModelRopeStyle
from engine.model.config import Routing as ModelRouting
from engine.model.loader import LoadedModel
from engine.model.weights import ExpertLinear, FfnWeights, LatentWeights, LayerWeights, Linear, MoeWeights, Norm

ACTIVATIONS = {
    ModelActivation.SILU: Activation.SILU,
    ModelActivation.GELU: Activation.GELU_TANH,
    ModelActivation.RELU: Activation.RELU,
    ModelActivation.RELU_SQUARED: Activation.RELU_SQUARED,
    ModelActivation.SWIGLU_CLAMPED: Activation.SWIGLU_CLAMPED,
}
_GATINGS = {
    ModelRouting.SOFTMAX: Gating.SOFTMAX,
    ModelRouting.SIGMOID: Gating.SIGMOID,
    ModelRouting.SOFTMAX_CHOSEN: Gating.SOFTMAX_OF_CHOSEN,
}
_ROPE_STYLES = {ModelRopeStyle.NORM: RopeStyle.ADJACENT, ModelRopeStyle.NEOX: RopeStyle.HALVES}


def attention_shape(config: AttentionConfig, cache_half: bool) -> AttentionShape:
    """The kernel shape of one layer's attention."""
    rope = None if rotates_apart(config) else config.rope
    return AttentionShape(
        heads=config.n_heads,
        kv_heads=config.n_kv_heads,
        key_dim=config.key_width,
        value_dim=config.value_width,
        rope_dim=0 if rope is None else rope.n_rot,
        rope_style=RopeStyle.ADJACENT if rope is None else _ROPE_STYLES[rope.style],
        cache_half=cache_half,
        alibi=config.alibi > 0.0,
        values_in_keys=config.values_in_keys,
    )


def rotates_apart(config: AttentionConfig) -> bool:
    """Whether queries and keys are rotated before the attention kernels see them, which else do it themselves."""
    return config.latent is not None or config.qk_norm_after_rope


def folds(norm: Norm | None) -> bool:
    """Whether the kernels of products and attention can apply a norm; others take a row kernel of their own."""
    return norm is not None and norm.kind is NormKind.RMS and norm.weight is not None and norm.bias is None


def folds_heads(layer: LayerWeights) -> bool:
    """Whether the attention kernels norm queries and keys themselves, or there is nothing to norm."""
    config, weights = layer.config.attention, layer.attention
    if config.qk_norm is None:
        return True
    plain = config.qk_norm is QkNorm.HEAD and not config.qk_norm_after_rope
    return plain and folds(weights.q_norm) and folds(weights.k_norm)


def can_pair(weights: FfnWeights, config: FfnConfig) -> bool:
    """Whether gate and up go in one launch: nothing stands between the products and the next one but the activation."""
    gate, up = weights.gate, weights.up
    if gate is None or kept_as(gate.weight.type) != kept_as(up.weight.type) or weights.act_scales is not None:
        return False
    if config.activation is ModelActivation.SWIGLU_CLAMPED:  # up is bent too
        return False
    return all(part.bias is None and part.scale == 1.0 for part in (gate, up))


def kernel_groups(
    model: LoadedModel, *, prompts: bool = False
) -> list[tuple[list[tuple[GGMLType, int]], int, bool, Activation]]:
    """Every kind of launch the uploader will make: (type, rows) of its matrices, columns, paired, activation.

    Needs no GPU: kernels can be built while the weights are still on their way.

    Args:
        model: the model.
        prompts: also the experts and heads that decode steps multiply with kernels of their own.
    """
    groups: list[tuple[list[tuple[GGMLType, int]], int, bool, Activation]] = []

    def add(linears: Sequence[Linear]) -> None:
        together = all(linear.scale == 1.0 for linear in linears)
        for group in [list(linears)] if together else [[linear] for linear in linears]:
            shapes = [(kept_as(linear.weight.type), linear.weight.rows) for linear in group]
            groups.append((shapes, group[0].weight.columns, False, Activation.NONE))

    def add_ffn(weights: FfnWeights, config: FfnConfig) -> None:
        if can_pair(weights, config):
            shape = [(kept_as(weights.up.weight.type), weights.up.weight.rows)]
            groups.append((shape, weights.up.weight.columns, True, ACTIVATIONS[config.activation]))
        else:
            add([weights.up])
            if weights.gate is not None:
                add([weights.gate])
        add([weights.down])

    def add_attention(layer: LayerWeights) -> None:
        latent = layer.attention.latent
        if latent is None:
            add(list(layer.attention.qkv))
            return
        add(latent_inputs(latent))
        for linear in (latent.q_b, latent.kv_b):
            if linear is not None:
                add([linear])
        for heads in (latent.k_b, latent.v_b):
            if heads is not None and (prompts or not can_join_heads(heads)):
                add([heads.expert(0)])

    for layer in model.weights.layers:
        attention, moe, config = layer.attention, layer.moe, layer.config.ffn
        add_attention(layer)
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


def latent_inputs(latent: LatentWeights) -> list[Linear]:
    """What latent attention multiplies the normed input with: queries or their compression, and kv_a."""
    queries = latent.q if latent.q is not None else latent.q_a
    assert queries is not None
    return [queries, latent.kv_a]


def can_join_heads(heads: ExpertLinear) -> bool:
    """Whether a decode step multiplies all heads in one launch; else one by one."""
    plain = heads.scale is None and heads.bias is None
    return plain and can_multiply_heads(heads.weight.type, heads.weight.rows, heads.weight.shape[0])


def head_jobs(model: LoadedModel, arch: int) -> list[tuple[tuple[str, ...], dict[str, object]]]:
    """The build jobs of the matrices of single heads, for module.prebuild."""
    stacks = [
        heads
        for layer in model.weights.layers
        if layer.attention.latent is not None
        for heads in (layer.attention.latent.k_b, layer.attention.latent.v_b)
        if heads is not None and can_join_heads(heads)
    ]
    return [head_job(kept_as(heads.weight.type), heads.weight.shape[0], arch) for heads in stacks]


def moe_jobs(model: LoadedModel, arch: int) -> list[tuple[tuple[str, ...], dict[str, object]]]:
    """The build jobs of routing and of the expert kernels of a model, for module.prebuild."""
    jobs = []
    for layer in model.weights.layers:
        moe, config = layer.moe, layer.config.ffn
        if moe is None or not isinstance(config, MoeConfig):
            continue
        jobs.append(route_job(expert_routing(config)))
        router = moe.router.weight
        if can_score(kept_as(router.type), router.columns):
            jobs.append(router_job(kept_as(router.type)))
        if can_gather_experts(moe, config):
            types = kept_as(moe.up.weight.type), kept_as(moe.down.weight.type)
            activation, widths = ACTIVATIONS[config.expert.activation], (config.expert.width, model.config.width)
            jobs += expert_jobs(*types, activation, expert_routing(config), arch, *widths)
            if can_share_experts(moe, config, arch):
                jobs += moe_rows.build_jobs(*types, activation, expert_routing(config), *widths)
    return jobs


def expert_routing(config: MoeConfig, factor: float = 1.0) -> Routing:
    """The routing of a layer as the kernels take it; the chosen weights are multiplied by `factor` as well."""
    return Routing(
        n_experts=config.n_experts,
        n_used=config.n_used,
        gating=_GATINGS[config.routing],
        groups=config.n_groups,
        groups_used=config.n_groups_used,
        normalize=config.normalize,
        weight_scale=config.weight_scale * factor,
    )


def can_gather_experts(moe: MoeWeights, config: MoeConfig) -> bool:
    """Whether a decode step reads the chosen experts only; else every expert runs over every row."""
    gate, up, down = moe.gate, moe.up, moe.down
    if gate is None:
        return False
    plain = all(part.scale is None for part in (gate, up, down))
    width, columns = config.expert.width, gate.weight.columns
    return plain and can_gather(kept_as(gate.weight.type), kept_as(up.weight.type), width, columns)


def can_share_experts(moe: MoeWeights, config: MoeConfig, arch: int) -> bool:
    """Whether rows of a decode step that chose the same expert may read it together."""
    if not can_gather_experts(moe, config):
        return False
    assert moe.gate is not None
    types = kept_as(moe.gate.weight.type), kept_as(moe.down.weight.type)
    return moe_rows.can_share(*types, config.expert.width, moe.gate.weight.columns, arch)


def halves_apart(moe: MoeWeights, config: MoeConfig) -> bool:
    """Whether something stands between the products of gathered experts that the kernels of prompts do not fold in."""
    biased = any(part is not None and part.bias is not None for part in (moe.gate, moe.up, moe.down))
    return biased or config.expert.activation is ModelActivation.SWIGLU_CLAMPED


def can_stack_experts(moe: MoeWeights, config: MoeConfig, arch: int) -> bool:
    """Whether rows of prompts are multiplied by the experts they chose only; else by every expert."""
    if arch != gemm.ARCH or not can_gather_experts(moe, config) or halves_apart(moe, config):
        return False
    assert moe.gate is not None
    types = kept_as(moe.gate.weight.type), kept_as(moe.down.weight.type)
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


def expert_room(model: LoadedModel, prompt_rows: int, decode_rows: int, arch: int) -> int:
    """Bytes of scratch memory that prompts and decode steps of so many rows need for their experts, one at a time."""
    sizes, rows = [0], max(prompt_rows, decode_rows)
    for layer in model.weights.layers:
        moe, config = layer.moe, layer.config.ffn
        if moe is None or not isinstance(config, MoeConfig):
            continue
        shape = expert_routing(config), config.expert.width, model.config.width
        if can_stack_experts(moe, config, arch):
            sizes.append(room_bytes(rows, *shape))
        if can_share_experts(moe, config, arch):
            sizes.append(moe_rows.room_bytes(decode_rows, *shape))
    return max(sizes)


def multiplies_halves(model: LoadedModel) -> bool:
    """Whether prompts need gate and up of some gathered experts apart."""
    mixtures = [(layer.moe, layer.config.ffn) for layer in model.weights.layers]
    return any(
        moe is not None
        and isinstance(config, MoeConfig)
        and can_gather_experts(moe, config)
        and halves_apart(moe, config)
        for moe, config in mixtures
    )
