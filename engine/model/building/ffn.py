"""Weights of feed-forward parts, dense and mixtures of experts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from engine.errors import ModelFileError
from engine.model.building.source import TensorSource
from engine.model.config import FfnConfig, MoeConfig
from engine.model.parts import FfnParts, Presence
from engine.model.weights import ExpertLinear, ExpertsWeights, FfnWeights, LatentExpertWeights, MoeWeights, Norm


def build_ffn(source: TensorSource, prefix: str, ffn: FfnConfig, suffix: str = "") -> FfnWeights:
    """A dense part; names of its tensors end in `suffix`."""
    tensors, width, parts = source.tensors, source.width, _parts(source)
    gate_name, up_name = f"{prefix}.ffn_gate{suffix}", f"{prefix}.ffn_up{suffix}"
    gate = None
    if ffn.gated and _gate_is_fused(source, gate_name):
        both = source.feed_forward_linear(up_name, 2 * ffn.width, width)
        gate, up = both.slice_rows(0, ffn.width), both.slice_rows(ffn.width, 2 * ffn.width)
    else:
        if ffn.gated:
            gate = source.feed_forward_linear(gate_name, ffn.width, width)
        up = source.feed_forward_linear(up_name, ffn.width, width)
    down = source.feed_forward_linear(f"{prefix}.ffn_down{suffix}", width, ffn.width)
    act_scales = tensors.optional_vector(f"{prefix}.ffn.act.scales", (ffn.width,)) if parts.act_scales else None
    sub_norm = source.norm(f"{prefix}.ffn_sub_norm{suffix}", (ffn.width,)) if ffn.sub_norm else None
    return FfnWeights(gate=gate, up=up, down=down, act_scales=act_scales, sub_norm=sub_norm)


def build_moe(source: TensorSource, prefix: str, moe: MoeConfig) -> MoeWeights:
    """A mixture of experts with its router and its shared expert."""
    tensors, width, experts = source.tensors, source.width, moe.n_experts
    parts = source.architecture.moe
    assert parts is not None
    shared_gate = moe.shared is not None and moe.shared_gate
    router = source.linear(f"{prefix}.ffn_gate_inp", experts, width)
    inner = moe.latent_width or width
    gate, up = _expert_gate_up(source, prefix, moe, inner)
    adjugate = None
    if moe.adjugate is not None:
        groups, rows = experts // moe.adjugate.per_group, moe.adjugate.expert.width
        adjugate = ExpertsWeights(
            gate=source.experts(f"{prefix}.ffn_gate_chexps", groups, rows, width),
            up=source.experts(f"{prefix}.ffn_up_chexps", groups, rows, width),
            down=source.experts(f"{prefix}.ffn_down_chexps", groups, width, rows),
        )
    bias = None
    if parts.selection_bias:
        bias_name = f"{prefix}.exp_probs_b"
        bias = tensors.optional_vector(bias_name if tensors.has(bias_name) else f"{bias_name}.bias", (experts,))
    return MoeWeights(
        router=router,
        gate=gate,
        up=up,
        down=source.experts(f"{prefix}.ffn_down_exps", experts, inner, moe.expert.width),
        shared=None if moe.shared is None else _shared(source, prefix, moe.shared, moe.shared_scale),
        shared_gate=tensors.linear(f"{prefix}.ffn_gate_inp_shexp", 1, width) if shared_gate else None,
        selection_bias=bias,
        token_experts=_token_experts(source, prefix, moe) if moe.by_token else None,
        latent=None if moe.latent_width is None else _latent(source, prefix, moe.latent_width),
        adjugate=adjugate,
        **_norms(source, prefix, moe),
    )


def _token_experts(source: TensorSource, prefix: str, moe: MoeConfig) -> npt.NDArray[np.int32]:
    """The experts (V, n_used) of each token."""
    name = f"{prefix}.ffn_gate_tid2eid.weight"
    chosen = source.tensors.vector(name, (source.config.vocab_size, moe.n_used))
    if not ((chosen >= 0) & (chosen < moe.n_experts) & (chosen == np.floor(chosen))).all():
        raise ModelFileError(f"tensor {name} holds numbers that name no expert; allowed are 0 to {moe.n_experts - 1}")
    return chosen.astype(np.int32)


def _norms(source: TensorSource, prefix: str, moe: MoeConfig) -> dict[str, Norm]:
    """Norms of the experts' own, by field of MoeWeights."""
    width, config = source.width, source.config
    if moe.reads_input:
        return {"norm": source.norm(f"{prefix}.ffn_norm_exps", (width,))}
    if not moe.separate_norms:
        return {}
    # The router's norm is in the file as a scale of its input, which is divided by sqrt(D) as well.
    scale = source.tensors.vector(f"{prefix}.ffn_gate_inp.scale", (width,)) / np.float32(math.sqrt(width))
    return {
        "router_norm": Norm(config.norm, config.norm_epsilon, scale),
        "norm": source.norm(f"{prefix}.pre_ffw_norm_2", (width,)),
        "expert_post_norm": source.norm(f"{prefix}.post_ffw_norm_2", (width,)),
        "shared_post_norm": source.norm(f"{prefix}.post_ffw_norm_1", (width,)),
    }


def _latent(source: TensorSource, prefix: str, width: int) -> LatentExpertWeights:
    name = f"{prefix}.ffn_routed"
    return LatentExpertWeights(
        down=source.linear(f"{name}_down", width, source.width),
        norm=source.norm(f"{name}_norm", (width,)) if source.tensors.has(f"{name}_norm.weight") else None,
        up=source.linear(f"{name}_up", source.width, width),
    )


def _shared(source: TensorSource, prefix: str, ffn: FfnConfig, factor: float) -> FfnWeights:
    """The shared part times a factor."""
    parts = source.architecture.moe
    assert parts is not None
    weights = build_ffn(source, prefix, ffn, "" if parts.shared_named_dense else "_shexp")
    if factor == 1.0:
        return weights
    down, bias = weights.down, weights.down.bias
    bias = None if bias is None else bias * np.float32(factor)
    return replace(weights, down=replace(down, bias=bias, scale=down.scale * factor))


def _parts(source: TensorSource) -> FfnParts:
    parts = source.architecture.ffn
    assert parts is not None
    return parts


def _gate_is_fused(source: TensorSource, gate_name: str) -> bool:
    presence = _parts(source).fused_gate
    if presence is Presence.OPTIONAL:
        return not source.tensors.has(f"{gate_name}.weight")
    return presence is Presence.ALWAYS


def _expert_gate_up(
    source: TensorSource, prefix: str, moe: MoeConfig, width: int
) -> tuple[ExpertLinear | None, ExpertLinear]:
    """Gate and up of experts that read `width` numbers."""
    rows, experts = moe.expert.width, moe.n_experts
    fused = f"{prefix}.ffn_gate_up_exps"
    if moe.expert.gated and source.tensors.has(f"{fused}.weight"):
        both = source.experts(fused, experts, 2 * rows, width)
        return both.slice_rows(0, rows), both.slice_rows(rows, 2 * rows)
    gate = source.experts(f"{prefix}.ffn_gate_exps", experts, rows, width) if moe.expert.gated else None
    return gate, source.experts(f"{prefix}.ffn_up_exps", experts, rows, width)
