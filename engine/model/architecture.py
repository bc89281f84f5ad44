"""What an architecture file declares: which parts a model family is made of. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.model.config import Activation, NormKind, QkNorm, RopeStyle, Routing


class Presence(Enum):
    """Whether a family's files have something."""

    NEVER = "never"
    OPTIONAL = "optional"  # as the file has it
    ALWAYS = "always"


class Parallel(Enum):
    """Whether the feed-forward part reads the layer's input, beside attention."""

    NEVER = "never"
    ALWAYS = "always"
    STATED = "stated"  # use_parallel_residual says so
    WITHOUT_NORM = "without_norm"  # where a layer has no ffn_norm, and then it shares attn_norm's


class LogitScale(Enum):
    """What logit_scale in the file does."""

    NONE = "none"
    MULTIPLIES = "multiplies"
    DIVIDES = "divides"


@dataclass(frozen=True, kw_only=True)
class MoeParts:
    """The mixture of experts of a family, used in files whose expert_count is above zero.

    Attributes:
        routing: how scores become weights, where the file's expert_gating_func does not say (it is always heard).
        normalize: the chosen weights are divided by their sum; None = expert_weights_norm says whether.
        weight_scale: expert_weights_scale is read.
        required: the family has no dense form.
        dense_lead: leading_dense_block_count layers come first that have an ordinary feed-forward part.
        interleaved: interleave_moe_layer_step is read: only the last layer of each so many has experts.
        groups: expert_group_count and expert_group_used_count are read.
        width_of_used: without expert_feed_forward_length feed_forward_length is the width of all used experts together.
        shared: an expert for every token, of expert_shared_feed_forward_length columns, else (where shared_counted)
            expert_shared_count times an expert's width, else (where shared_like_dense) of a dense part's width.
        shared_counted, shared_like_dense: see shared.
        shared_gate: the shared expert's output is multiplied by sigmoid(ffn_gate_inp_shexp · x).
        selection_bias: exp_probs_b joins the choice of experts, where the file has it.
        activation: of the experts, where it is not that of dense parts.
    """

    routing: Routing = Routing.SOFTMAX
    normalize: bool | None = True
    weight_scale: bool = False
    required: bool = False
    dense_lead: bool = False
    interleaved: bool = False
    groups: bool = False
    width_of_used: bool = False
    shared: bool = False
    shared_counted: bool = False
    shared_like_dense: bool = False
    shared_gate: bool = False
    selection_bias: bool = False
    activation: Activation | None = None


@dataclass(frozen=True, kw_only=True)
class WindowParts:
    """Sliding windows of a family: attention.sliding_window positions in some layers.

    Attributes:
        period: without attention.sliding_window_pattern in the file, the last layer of each `period` is full (1: no
            layer has a window, 0: all have).
        default: window where the file does not say; None = no windows there.
        rotated_only: layers without a window do not rotate (where the model has any windows).
        base: default of rope.freq_base_swa, which windowed layers rotate with; None = that of the other layers.
        unscaled: windowed layers rotate without the scaling of the others.
        n_layers: only models of so many layers have windows; None = any.
    """

    period: int = 0
    default: int | None = None
    rotated_only: bool = False
    base: float | None = None
    unscaled: bool = False
    n_layers: int | None = None


class MixerKind(Enum):
    """What layers mix tokens with."""

    ATTENTION = "attention"
    MAMBA = "mamba1"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model family: parts, their order and constants, and which optional metadata it reads.

    Attributes:
        name: value of general.architecture, also the prefix of its metadata keys.
        mixer: what every layer mixes tokens with.
        feed_forward: layers have a feed-forward part.
        rope: pairing of rotated elements; None = nothing is rotated.
        rope_base: default of rope.freq_base.
        rope_sections: pairing where rope.dimension_sections splits the frequencies among several axes of position.
        rope_switch: rope.scaling.finetuned says whether anything is rotated.
        no_rope_every: every n-th layer rotates nothing.
        longrope: rope_factors_long and rope_factors_short divide the frequencies.
        rope_freqs: the tensor rope_freqs.weight may divide the rotation frequencies.
        norm: kind of every norm.
        norm_epsilon: where the file does not state it; None = it must.
        norm_weight: norms have a weight.
        norm_bias: norms have a bias.
        embedding_norm: token_embd_norm stands behind the embedding.
        position_embd: learned positions.
        attn_norm, ffn_norm: tensor names of the norms before the parts, the first that the file has; () = none.
        attn_post_norm, ffn_post_norm: the same of the norms behind the parts, before the residual.
        parallel: order of the parts.
        biases: projections that cannot do without a bias; any other may have one.
        unused_biases: projections whose bias, if a file has one, takes no part.
        qk_norm: how q and k are normalized.
        qk_norm_presence: whether files have attn_q_norm and attn_k_norm.
        qk_norm_after_rope: they stand behind the rotation.
        clamp: attention.clamp_kqv is read.
        alibi: attention.max_alibi_bias is read; the default, None = not read.
        attn_softcap: attn_logit_softcapping is read; the default, None = not read.
        logit_softcap: the same of final_logit_softcapping.
        sinks: attn_sinks takes part in softmax.
        window: sliding windows.
        temperature: attention.temperature_scale is read.
        attention_scale: attention.scale is read; 0 there means 1 / sqrt(Hd).
        scale_by_width: models of these numbers of layers scale scores by 1 / sqrt(D / H).
        latent: latent attention.
        activation: of the feed-forward parts.
        gated: feed-forward parts have a gate.
        fused_gate: ffn_up holds the gate's rows before its own; OPTIONAL: where ffn_gate is missing.
        act_scales: ffn.act.scales may divide the activations.
        moe: mixture of experts, where the family has one.
        ffn_scale: ffn_*.scale tensors multiply their projections; most families leave them out, as llama.cpp does.
        embedding_sqrt_width: token vectors are multiplied by sqrt(D).
        embedding_scale: embedding_scale is read; the default, None = not read.
        residual_scale: residual_scale is read; c of the default c / sqrt(layers), 0 = 1, None = not read.
        logit_scale: what logit_scale does.
        logit_width: without logit_scale in the file it is D / this; None = 1.
        next_token_layers: the last nextn_predict_layers layers guess later tokens and take no part.
        ignored_keys: metadata that such files hold and that changes nothing here.
        ignored_tensors: names of tensors such files may hold that take no part in next-token logits ("blk.*.x" = of
            any layer).
    """

    name: str
    rope: RopeStyle | None
    mixer: MixerKind = MixerKind.ATTENTION
    feed_forward: bool = True
    rope_base: float = 10000.0
    rope_sections: RopeStyle | None = None
    rope_switch: bool = False
    no_rope_every: int | None = None
    longrope: bool = False
    rope_freqs: bool = False
    norm: NormKind = NormKind.RMS
    norm_epsilon: float | None = None
    norm_weight: bool = True
    norm_bias: Presence = Presence.NEVER
    embedding_norm: bool = False
    position_embd: Presence = Presence.NEVER
    attn_norm: tuple[str, ...] = ("attn_norm",)
    ffn_norm: tuple[str, ...] = ("ffn_norm",)
    attn_post_norm: tuple[str, ...] = ()
    ffn_post_norm: tuple[str, ...] = ()
    parallel: Parallel = Parallel.NEVER
    biases: tuple[str, ...] = ()
    unused_biases: tuple[str, ...] = ()
    qk_norm: QkNorm | None = None
    qk_norm_presence: Presence = Presence.ALWAYS
    qk_norm_after_rope: bool = False
    clamp: bool = False
    alibi: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    sinks: bool = False
    window: WindowParts | None = None
    temperature: bool = False
    attention_scale: bool = False
    scale_by_width: frozenset[int] = frozenset()
    latent: bool = False
    activation: Activation = Activation.SILU
    gated: bool = True
    fused_gate: Presence = Presence.NEVER
    act_scales: bool = False
    moe: MoeParts | None = None
    ffn_scale: bool = False
    embedding_sqrt_width: bool = False
    embedding_scale: float | None = None
    residual_scale: float | None = None
    logit_scale: LogitScale = LogitScale.NONE
    logit_width: int | None = None
    next_token_layers: bool = False
    ignored_keys: tuple[str, ...] = ()
    ignored_tensors: tuple[str, ...] = ()
