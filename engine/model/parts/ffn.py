"""Feed-forward parts and mixtures of experts, as declarations name them. Read by engine/model/reading/ffn.py."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from engine.model.config import Activation, Routing
from engine.model.parts.presence import Presence


@dataclass(frozen=True)
class FfnParts:
    """Dense feed-forward parts; experts share what is said here.

    Attributes:
        activation: the non-linearity.
        gated: there is a gate.
        ungated: the activation of layers without one, in families where files differ in it: those whose tensors have
            neither ffn_gate nor an ffn_up of twice the rows; None = all of a family's files are alike.
        stated: hidden_activation may name another activation of the gate.
        width_divisor: a part has feed_forward_length / this columns.
        fused_gate: ffn_up holds the gate's rows before its own; OPTIONAL: where ffn_gate is missing.
        act_scales: ffn.act.scales may divide the activations.
        scales: ffn_*.scale tensors multiply their projections; most families leave them out, as llama.cpp does.
            limits: swiglu_clamp_shexp (of dense and shared parts) and swiglu_clamp_exp (of experts) are read.
        limits_gate: they limit the gate before the activation.
        limits_alike: without swiglu_clamp_shexp, swiglu_clamp_exp is taken.
        sparse_layers: activation_sparsity_scale is read; without it the first so many layers have the usual sparsity.
        channel_mix: parts mix each token with the one before (RWKV); see ChannelMixConfig.
        sub_norm: ffn_sub_norm normalizes what the last projection reads.
    """

    activation: Activation = Activation.SILU
    _: KW_ONLY
    gated: bool = True
    ungated: Activation | None = None
    stated: bool = False
    width_divisor: int = 1
    fused_gate: Presence = Presence.NEVER
    act_scales: bool = False
    scales: bool = False
    limits: bool = False
    limits_gate: bool = False
    limits_alike: bool = False
    sparse_layers: int = 0
    channel_mix: bool = False
    sub_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class MoeParts:
    """The mixture of experts of a family, used in files whose expert_count is above zero.

    Attributes:
        routing: how scores become weights, where the file's expert_gating_func, which is always read, does not say.
        normalize: the chosen weights are divided by their sum; None = expert_weights_norm says whether.
        weight_scale: expert_weights_scale is read.
        required: the family has no dense form.
        dense_lead: the first leading_dense_block_count layers have a dense feed-forward part.
        dense_without_router: layers without ffn_gate_inp have a dense feed-forward part.
        interleaved: interleave_moe_layer_step is read: only the last layer of each so many has experts.
        every: moe_every_n_layers is read: only the second layer of each so many has experts; 0 = none has.
        groups: expert_group_count and expert_group_used_count are read.
        width_of_used: without expert_feed_forward_length feed_forward_length is the width of all used experts together.
        shared: an expert for every token, of expert_shared_feed_forward_length columns, else (where shared_counted)
            expert_shared_count (or shared_least, if that is more) times an expert's width, else (where
            shared_like_dense) of a dense part's width.
        shared_counted, shared_least, shared_like_dense: see shared.
        shared_named_dense: the shared expert's tensors have the names of a dense part and say how wide it is; it may be
            missing.
        shared_factor: beside a shared expert, the sum of all experts is multiplied by this.
        shared_gate: the shared expert's output is multiplied by sigmoid(ffn_gate_inp_shexp · x).
        selection_bias: exp_probs_b joins the choice of experts, where the file has it.
        activation: of the experts, where it is not that of dense parts.
        latent: expert_latent_length is read.
        weights_inputs: an expert's weight multiplies its input, not its output.
        routed_early: the router reads the layer's input, before the mixer and its norm.
        adjugates: experts_per_group experts share a smaller one, of ffn_*_chexps; expert_group_scale is read.
        reads_input: router and experts, but not the shared expert, read the layer's input, normalized by ffn_norm_exps.
        by_token: hash_layer_count is read: in the first so many layers ffn_gate_tid2eid says which experts a token has.
        separate_norms: router, experts and shared expert have norms of their own, before and behind them.
    """

    routing: Routing = Routing.SOFTMAX
    normalize: bool | None = True
    weight_scale: bool = False
    required: bool = False
    dense_lead: bool = False
    dense_without_router: bool = False
    interleaved: bool = False
    every: bool = False
    groups: bool = False
    width_of_used: bool = False
    shared: bool = False
    shared_counted: bool = False
    shared_least: int = 0
    shared_like_dense: bool = False
    shared_named_dense: bool = False
    shared_factor: float = 1.0
    shared_gate: bool = False
    selection_bias: bool = False
    activation: Activation | None = None
    latent: bool = False
    weights_inputs: bool = False
    routed_early: bool = False
    adjugates: bool = False
    reads_input: bool = False
    separate_norms: bool = False
    by_token: bool = False
