"""Feed-forward parts of a model's layers, from metadata."""

from __future__ import annotations

import math
from dataclasses import replace

from engine.errors import ModelFileError, UnsupportedModelError
from engine.model.config import Activation, AdjugateConfig, ChannelMixConfig, FfnConfig, MoeConfig, Routing
from engine.model.parts import FfnParts, MoeParts
from engine.model.reading.metadata import LIMIT, HyperParameters
from engine.model.reading.source import Source

GATING = {1: Routing.SOFTMAX, 2: Routing.SIGMOID, 3: Routing.SOFTMAX_CHOSEN, 4: Routing.SQRT_SOFTPLUS}
"""Values of expert_gating_func; 0 = the family's own."""

USUAL_SPARSITY = 1.6448533535003662
"""Deviations above the mean that a twentieth of normally distributed numbers exceeds, as Gemma 3n was trained."""

ACTIVATIONS = {
    "gelu": Activation.GELU,
    "geglu": Activation.GELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "swiglu": Activation.SILU,
}
"""Values of hidden_activation."""
LEAST_LIMIT = 1e-6
"""Limits up to this mean that there is none."""


def read_ffns(source: Source) -> list[FfnConfig | MoeConfig | ChannelMixConfig | None]:
    """The feed-forward part of each layer; None where the family has none.

    Raises:
        ModelFileError, UnsupportedModelError: a key has a value that is impossible or not supported.
    """
    ffn = source.architecture.ffn
    if ffn is None:
        return [None] * source.n_layers
    moe = source.architecture.moe
    dense = moe is None or not moe.required or moe.dense_lead
    default = None if dense else (0,) * source.n_blocks
    widths = source.read.per_layer("feed_forward_length", source.n_blocks, default, low=0)
    return [_layer(source, ffn, index, widths[index] // ffn.width_divisor) for index in range(source.n_layers)]


def _layer(source: Source, ffn: FfnParts, index: int, width: int) -> FfnConfig | MoeConfig | ChannelMixConfig | None:
    """The feed-forward part of layer `index`, of `width` columns where it is dense (0 = not stated)."""
    read, parts = source.read, source.architecture.moe
    if width == 0 and (source.architecture.layer.one_part or source.architecture.layer.without_heads):
        return None
    n_experts = read.integer("expert_count", 0, low=0) if parts is not None else 0
    lead = read.integer("leading_dense_block_count", 0, low=0) if parts is not None and parts.dense_lead else 0
    step = read.integer("interleave_moe_layer_step", 1, low=0) if parts is not None and parts.interleaved else 1
    dense = index < lead or (index + 1) % max(step, 1) != 0
    if parts is not None and parts.every:
        every = read.integer("moe_every_n_layers", 0, low=0)
        dense = every == 0 or index % every != 1
    if parts is not None:
        dense = dense or (n_experts == 0 and not parts.required)
        router = f"{source.prefix}.{index}.ffn_gate_inp.weight"
        dense = dense or (parts.dense_without_router and router not in source.tensors)
    if parts is None or dense:
        if width == 0:
            raise ModelFileError(f"feed_forward_length of layer {index} is 0; allowed is a positive integer")
        if ffn.channel_mix:
            receptance = f"blk.{index}.channel_mix_receptance.weight" in source.tensors
            return ChannelMixConfig(width=width, receptance=receptance)
        limit = _limit(source, ffn, "swiglu_clamp_shexp", index)
        part = _dense(source, ffn, index, _part(source, ffn, width, ffn.activation, limit))
        sparsity, xielu = _sparsity(source, ffn, index), _xielu(source, ffn, index)
        return replace(part, sparsity=sparsity, xielu=xielu, sub_norm=ffn.sub_norm)
    return _moe(source, ffn, parts, index, width)


def _xielu(source: Source, ffn: FfnParts, index: int) -> tuple[float, float, float, float] | None:
    """The constants of Activation.XIELU in layer `index`; files hold what softplus makes the first two of."""
    if ffn.activation is not Activation.XIELU:
        return None
    read = source.read.under("xielu")
    positive, negative, beta, epsilon = (
        read.numbers_per_layer(key, source.n_blocks, None, low=-LIMIT, high=LIMIT)[index]
        for key in ("alpha_p", "alpha_n", "beta", "eps")
    )
    return math.log1p(math.exp(min(positive, 80.0))), beta + math.log1p(math.exp(min(negative, 80.0))), beta, epsilon


def _sparsity(source: Source, ffn: FfnParts, index: int) -> float:
    """FfnConfig.sparsity of layer `index`."""
    if not ffn.sparse_layers:
        return 0.0
    usual = USUAL_SPARSITY if index < ffn.sparse_layers else 0.0
    key = "activation_sparsity_scale"
    return max(0.0, source.read.numbers_per_layer(key, source.n_blocks, usual, low=-LIMIT, high=LIMIT)[index])


def _dense(source: Source, ffn: FfnParts, index: int, part: FfnConfig) -> FfnConfig:
    """The dense part of a layer, with what its tensors and hidden_activation say where families' files differ."""
    if ffn.stated:
        part = replace(part, activation=_stated(source, ffn.activation))
    if ffn.ungated is None:
        return part
    name = f"{source.prefix}.{index}.ffn"
    up = source.tensors.get(f"{name}_up.weight")
    gated = f"{name}_gate.weight" in source.tensors or (up is not None and up.shape[0] == 2 * part.width)
    return part if gated else replace(part, activation=ffn.ungated, gated=False)


def _stated(source: Source, usual: Activation) -> Activation:
    name = source.read.text("hidden_activation", "")
    if name and name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{source.name}.hidden_activation is {name!r}; supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name] if name else usual


def _moe(source: Source, ffn: FfnParts, parts: MoeParts, index: int, width: int) -> MoeConfig:
    read = source.read
    n_experts = read.integer("expert_count")
    n_used = read.integer("expert_used_count", high=n_experts)
    stated = read.per_layer("expert_feed_forward_length", source.n_blocks, (0,) * source.n_blocks, low=0)
    stated_width = stated[index]
    expert_width = stated_width or (width // n_used if parts.width_of_used else width)
    if expert_width == 0:
        raise ModelFileError("expert_feed_forward_length and feed_forward_length are both 0; one must be positive")
    shared = _shared_width(source, parts, index, expert_width, width)
    activation = parts.activation or ffn.activation
    scale = read.number("expert_weights_scale", 0.0, low=-LIMIT, high=LIMIT) if parts.weight_scale else 0.0
    # The factor of the sum of all experts, taken apart.
    factor = parts.shared_factor if shared else 1.0
    limits = [_limit(source, ffn, f"swiglu_clamp_{which}", index) for which in ("exp", "shexp")]
    n_groups, n_groups_used = _groups(parts, read, n_experts, n_used)
    return MoeConfig(
        n_experts=n_experts,
        n_used=n_used,
        expert=_part(source, ffn, expert_width, activation, limits[0]),
        routing=_routing(source, parts),
        normalize=_normalize(source, parts),
        weight_scale=(scale or 1.0) * factor,
        n_groups=n_groups,
        n_groups_used=n_groups_used,
        shared=_part(source, ffn, shared, activation, limits[1]) if shared else None,
        shared_gate=parts.shared_gate,
        shared_scale=factor,
        weights_inputs=parts.weights_inputs,
        routed_early=parts.routed_early,
        adjugate=_adjugate(source, ffn, n_experts, n_used) if parts.adjugates else None,
        reads_input=parts.reads_input,
        latent_width=(read.integer("expert_latent_length", 0, low=0) or None) if parts.latent else None,
        separate_norms=parts.separate_norms,
        by_token=parts.by_token and index < read.integer("hash_layer_count", 0, low=0),
    )


def _adjugate(source: Source, ffn: FfnParts, n_experts: int, n_used: int) -> AdjugateConfig:
    read = source.read
    per_group = read.integer("experts_per_group", high=n_experts)
    if n_experts % per_group:
        raise ModelFileError(
            f"{n_experts} experts in groups of {per_group} (experts_per_group); allowed are groups of equal size"
        )
    width = read.integer("expert_chunk_feed_forward_length", 0, low=0) or read.integer("attention.key_length")
    return AdjugateConfig(
        per_group=per_group,
        n_used=min(n_used, n_experts // per_group),
        expert=_part(source, ffn, width, ffn.activation, None),
        scale=read.number("expert_group_scale", low=-LIMIT, high=LIMIT),
    )


def _part(source: Source, ffn: FfnParts, width: int, activation: Activation, limit: float | None) -> FfnConfig:
    """A dense part, or one of experts."""
    return FfnConfig(
        width=width,
        activation=activation,
        gated=ffn.gated,
        limit=limit,
        limits_gate=ffn.limits_gate and limit is not None,
        caps=_caps(source, activation),
    )


def _caps(source: Source, activation: Activation) -> tuple[float, float] | None:
    """The caps of the gate and, 0 = none, of what it multiplies."""
    if activation is not Activation.SITU:
        return None
    gate, up = (source.read.number(f"activation.situ_{key}", high=LIMIT) for key in ("beta", "linear_beta"))
    if gate < LEAST_LIMIT:
        raise ModelFileError(
            f"metadata key {source.name}.activation.situ_beta is {gate:g}; allowed is a number above {LEAST_LIMIT:g}"
        )
    return gate, max(up, 0.0)


def _limit(source: Source, ffn: FfnParts, key: str, index: int) -> float | None:
    """The limit of a layer's gated activations, from a list with one for each; up to 1e-6 there is none."""
    if not ffn.limits:
        return None
    if ffn.limits_alike and not source.read.has(key):
        key = "swiglu_clamp_exp"
    limit = source.read.numbers_per_layer(key, source.n_blocks, 0.0, low=0.0, high=LIMIT)[index]
    return limit if limit > LEAST_LIMIT else None


def _normalize(source: Source, parts: MoeParts) -> bool:
    stated = source.read.flag("expert_weights_norm", False)
    # Only converters made for the model write norm_top_k_prob.
    if parts.normalize is None or source.read.spelled("expert_weights_norm") == "norm_top_k_prob":
        return stated
    # Writers store false where they do not know; true is always meant.
    if stated and not parts.normalize:
        raise UnsupportedModelError(
            f"metadata key {source.name}.expert_weights_norm is true; architecture {source.name!r} is only "
            "known with weights that are not divided by their sum"
        )
    return parts.normalize


def _routing(source: Source, parts: MoeParts) -> Routing:
    number = source.read.integer("expert_gating_func", 0, low=0)
    if number and number not in GATING:
        raise UnsupportedModelError(
            f"{source.name}.expert_gating_func {number} is not supported; supported are 1 (softmax), 2 (sigmoid), "
            "3 (softmax over the chosen) and 4 (square root of softplus)"
        )
    return GATING.get(number, parts.routing)


def _shared_width(source: Source, parts: MoeParts, index: int, expert_width: int, dense_width: int) -> int:
    read = source.read
    if not parts.shared:
        return 0
    if parts.shared_named_dense:
        up = source.tensors.get(f"blk.{index}.ffn_up.weight")
        return 0 if up is None else int(up.shape[0])
    stated = read.integer("expert_shared_feed_forward_length", 0, low=0)
    if stated:
        return stated
    if parts.shared_counted:
        return expert_width * max(parts.shared_least, read.integer("expert_shared_count", 0, low=0, high=1024))
    return dense_width if parts.shared_like_dense else 0


def _groups(parts: MoeParts, read: HyperParameters, n_experts: int, n_used: int) -> tuple[int, int]:
    if not parts.groups:
        return 1, 1
    n_groups = read.integer("expert_group_count", 0, low=0, high=n_experts)
    if n_groups <= 1:
        return 1, 1
    n_groups_used = read.integer("expert_group_used_count", high=n_groups)
    size = n_experts // n_groups
    if n_experts % n_groups or size < 2 or n_groups_used * size < n_used:
        raise ModelFileError(
            f"{n_experts} experts in {n_groups} groups, {n_used} chosen from {n_groups_used} groups: allowed are "
            "groups of equal size, at least two experts each, that together hold the chosen number"
        )
    return n_groups, n_groups_used
