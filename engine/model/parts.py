"""Parts of model families, as the declarations in engine/model/architectures/ name them. Data only.

One class per part of the model. A default is what a plain model does, so a declaration names only what is different.
"Is read" says that the family takes the metadata key of that name; a family that does not read a key which changes the
computation refuses files that hold it.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from enum import Enum

from engine.model.config import Activation, GateFunction, NormKind, OutputGate, QkNorm, QkWeights, RopeStyle, Routing
from engine.model.indexer_config import IndexerKind
from engine.model.skip_config import SkipKind


class Presence(Enum):
    """Whether a family's files have something."""

    NEVER = "never"
    OPTIONAL = "optional"  # as the file has it
    ALWAYS = "always"


class Parallel(Enum):
    """Whether the feed-forward part reads the layer's input, beside the mixer."""

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
class EmbeddingParts:
    """From token ids to vectors of width D.

    Attributes:
        norm: token_embd_norm normalizes the vectors.
        bare_norm: the vectors are normalized, without a weight.
        positions: whether files have learned positions, position_embd.
        token_types: whether files have token_types, of which the first row is added to every vector.
        sqrt_width: vectors are multiplied by sqrt(D).
        scale: embedding_scale is read; the default (also for 0 in the file, 0 = 1), None = not read.
        per_layer: embedding_length_per_layer_input is read, the width of vectors that a token has for every layer; the
            default, None = not read.
    """

    norm: bool = False
    bare_norm: bool = False
    positions: Presence = Presence.NEVER
    token_types: Presence = Presence.NEVER
    sqrt_width: bool = False
    scale: float | None = None
    per_layer: int | None = None


@dataclass(frozen=True)
class NormParts:
    """All norms of a model.

    Attributes:
        kind: how a vector is normalized.
        epsilon: used where the file does not state it; None = the file must.
        weight: norms have a weight.
        bias: norms have a bias.
        either_epsilon: attention.layer_norm_epsilon is taken where attention.layer_norm_rms_epsilon is missing.
        either_kind: norms are of this kind only in files that leave out attention.layer_norm_rms_epsilon, else RMS.
    """

    kind: NormKind = NormKind.RMS
    _: KW_ONLY
    epsilon: float | None = None
    weight: bool = True
    bias: Presence = Presence.NEVER
    either_epsilon: bool = False
    either_kind: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """Norms of a layer and the order of its parts.

    A norm is a tuple of tensor names, of which the first that the file has is taken; () = no such norm.

    Attributes:
        attn_norm: the norm before the mixer.
        ffn_norm: the norm before the feed-forward part.
        attn_post_norm: the norm after the mixer, before the residual is added.
        ffn_post_norm: the norm after the feed-forward part, before the residual is added.
        output_norms: attn_output_norm and layer_output_norm come after the residuals are added; attn_norm_2 too, in
            layers that have it.
        attn_norm_optional: a layer without attn_norm reads its input as it is.
        prefix: layer i's tensors have names that begin with this and ".i.".
        parallel: whether mixer and feed-forward part read the same input.
        post_epsilon: ε of the norms after the parts, where it is not that of the others.
        residual_scale: residual_scale is read; c of the default c / sqrt(layers), 0 = 1, None = not read.
        without_heads: a layer whose attention.head_count is 0 has no mixer, and one whose feed_forward_length is 0 no
            feed-forward part.
        behind_stated: swin_norm may say that attn_norm and ffn_norm come after the parts.
        loops: num_loops is read: tokens pass all layers so many times, with output_norm between the passes unless
            skip_loop_final_norm.
        embedding_skip: layer_output_scale times the embedding is added to what a layer gives.
        one_part: a layer has one part alone: a feed-forward part where feed_forward_length is above zero, else a mixer.
        skip: residual connections that are more than a sum; None = what a part gives is added to what it read.
        output_scale: layer_output_scale multiplies what a layer gives, where the file has it.
        rescaled: rescale_every_n_layers is read: what the last of each so many layers gives is halved.
        streams: the residual stream is several vectors per token, mixed by AltUp: so many where the file does not say;
            None = it is one.
        laurel: a low-rank projection (laurel_l, laurel_r) is added beside the mixer.
        ngrams: ple.layers is read: the layer whose input vectors of n-grams are added to.
    """

    attn_norm: tuple[str, ...] = ("attn_norm",)
    ffn_norm: tuple[str, ...] = ("ffn_norm",)
    attn_post_norm: tuple[str, ...] = ()
    ffn_post_norm: tuple[str, ...] = ()
    output_norms: bool = False
    attn_norm_optional: bool = False
    prefix: str = "blk"
    parallel: Parallel = Parallel.NEVER
    post_epsilon: float | None = None
    residual_scale: float | None = None
    without_heads: bool = False
    one_part: bool = False
    behind_stated: bool = False
    loops: bool = False
    embedding_skip: bool = False
    skip: SkipKind | None = None
    output_scale: bool = False
    rescaled: bool = False
    streams: int | None = None
    laurel: bool = False
    ngrams: bool = False


@dataclass(frozen=True)
class RopeParts:
    """Rotary position embedding.

    Attributes:
        style: which elements of a head are rotated together.
        base: default of rope.freq_base.
        sections: the style where rope.dimension_sections splits the frequencies among several axes of position; None =
            the key is not read.
        switch: rope.scaling.finetuned says whether anything is rotated.
        halved: only half of rope.dimension_count elements are rotated in layers without a window.
        skip_every: the last layer of each n rotates nothing; in families with windows only where the model has them.
        skip_first: it is the first layer of each n instead.
        dense_lead: the first leading_dense_block_count layers rotate, also where others without a window do not.
        pattern: attention.rope_pattern may list which layers rotate.
        long_factors: rope_factors_long and rope_factors_short divide the frequencies.
        divisors: the tensor rope_freqs.weight may divide the frequencies.
        n_layers: only models of so many layers rotate; None = any.
        beta_fast: default of rope.scaling.yarn_beta_fast.
    """

    style: RopeStyle
    _: KW_ONLY
    base: float = 10000.0
    sections: RopeStyle | None = None
    switch: bool = False
    halved: bool = False
    skip_every: int | None = None
    skip_first: bool = False
    dense_lead: bool = False
    pattern: bool = False
    long_factors: bool = False
    divisors: bool = False
    n_layers: int | None = None
    beta_fast: float = 32.0


@dataclass(frozen=True, kw_only=True)
class WindowParts:
    """Sliding windows: attention.sliding_window positions in some layers.

    Attributes:
        period: without attention.sliding_window_pattern in the file, the last layer of each `period` is full (1: no
            layer has a window, 0: all have).
        full_first: it is the first layer of each period instead.
        chunks: positions are cut into chunks of that size, and a query sees those of its own chunk alone.
        default: window where the file does not say; None = no windows there.
        rotated_only: layers without a window do not rotate (where the model has any windows).
        base: default of rope.freq_base_swa, which windowed layers rotate with; None = that of the other layers.
        unscaled: windowed layers rotate without the scaling of the others.
        undivided: rope_freqs divides the frequencies of the other layers only.
        head_widths: attention.key_length_swa and attention.value_length_swa are read, or where attention is latent
            key_length_mla_swa, value_length_mla_swa and kv_lora_rank_swa.
        own_width: rope.dimension_count_swa says how many elements of a head they rotate.
        n_layers: only models of so many layers have windows; None = any.
        symmetric: windows reach to both sides, in models whose tokens see later ones.
    """

    period: int = 0
    full_first: bool = False
    chunks: bool = False
    default: int | None = None
    rotated_only: bool = False
    base: float | None = None
    unscaled: bool = False
    undivided: bool = False
    head_widths: bool = False
    own_width: bool = False
    n_layers: int | None = None
    symmetric: bool = False


@dataclass(frozen=True, kw_only=True)
class TemperatureParts:
    """Queries that grow with their position: see AttentionTemperature.

    Attributes:
        scale: default of attention.temperature_scale; 0 = none.
        length: default of attention.temperature_length; None = the original context of the rotation.
        offset: added to positions.
        unrotated: layers that do not rotate alone have it.
    """

    scale: float = 0.0
    length: int | None = None
    offset: int = 0
    unrotated: bool = False


@dataclass(frozen=True)
class QkNormParts:
    """Normalization of queries and keys by attn_q_norm and attn_k_norm.

    Attributes:
        kind: which elements are normalized together.
        presence: whether files have the two tensors; OPTIONAL = as layer by layer the file has them.
        after_rope: the norms come after the rotation.
        weights: of the norms.
        norm: kind of the norms; None = that of the model. epsilon: likewise its ε.
        rotated: layers that rotate alone have the norms.
        not_of_experts: models of so many experts have no norms, where attention.use_qk_norm does not say otherwise.
    """

    kind: QkNorm
    _: KW_ONLY
    presence: Presence = Presence.ALWAYS
    after_rope: bool = False
    weights: QkWeights = QkWeights.BOTH
    norm: NormKind | None = None
    epsilon: float | None = None
    rotated: bool = False
    not_of_experts: int | None = None


@dataclass(frozen=True)
class IndexerParts:
    """The indexer that chooses which positions attention reads; all sizes are in the metadata (attention.indexer.*).

    Attributes:
        kind: how positions are scored. TOKENS: every layer has an indexer; BLOCKS: every layer behind the first
            leading_dense_block_count; POOLED: layers whose attention.compress_ratios is above zero; GATED_POOLS: every
            layer with attention.
        style: which elements its queries and keys rotate together, where not those of attention.
        shared: attention.indexer.types is read: layers with 0 there take what the last layer with 1 chose.
        shared_context: without that key, models trained for so many positions or more have 1 in layers 0, 1, 2, 6, 10
            and so on, and others everywhere.
        rotated_last: the last elements of its queries and keys are rotated, not the first.
        optional: files without attention.indexer.top_k have no indexers.
        epsilon: of the layer norm of keys (TOKENS), which no key of a file states; None = that of the other norms.
    """

    kind: IndexerKind
    _: KW_ONLY
    style: RopeStyle | None = None
    shared: bool = False
    rotated_last: bool = False
    optional: bool = False
    epsilon: float | None = 1e-6
    shared_context: int | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionParts:
    """Attention beyond projections and softmax.

    Attributes:
        qk_norm: normalization of queries and keys; None = there is none.
        window: sliding windows; None = every position sees all before it.
        latent: attention reads low-rank latent vectors (DeepSeek-2).
        scale: attention.scale is read; 0 there means 1 / sqrt(Hd).
        fixed_scale: factor of scores, whatever the file says; None = it is not fixed.
        unscaled: scores are products as they are.
        scale_by_width: models of these numbers of layers scale scores by 1 / sqrt(D / H).
        linear_scale: scores are divided by Hd, not by its root.
        output_scale: attention.output_scale is read and is the factor of scores; the default, None = not read.
        temperature: queries that grow with their position; None = they do not.
        clamp: attention.clamp_kqv is read.
        alibi: attention.max_alibi_bias is read; the default, None = not read.
        alibi_layers: only models of so many layers have these biases; None = any.
        softcap: attn_logit_softcapping is read; the default, None = not read.
        sinks: attn_sinks takes part in softmax; OPTIONAL = in layers of which the file has it.
        output_gate: where the gate of the output comes from; None = there is none. Where it is OWN and attn_gate has H
            rows, it is PER_HEAD.
        gate_function: f of the gate.
        value_scale: attention.value_scale is read.
        indexer: chooses the positions that a query attends to; None = it attends to all.
        value_norm: values are normalized head by head, without a weight.
        sub_norm: attn_sub_norm normalizes what the heads give, all together.
        values_like_keys: without attn_v, attn_k gives the values too.
        shared_caches: attention.shared_kv_layers is read: so many layers at the end read the cache of an earlier layer.
        own_caches: without that key so many layers have a cache of their own; None = all.
        causal: tokens see no later ones, where attention.causal, which is always read, does not say.
        relative_buckets: attention.relative_buckets_count is read: attn_rel_b, if only that of the first layer, holds
            biases of distances.
        output: name of the output projection.
    """

    qk_norm: QkNormParts | None = None
    window: WindowParts | None = None
    latent: bool = False
    scale: bool = False
    fixed_scale: float | None = None
    unscaled: bool = False
    scale_by_width: frozenset[int] = frozenset()
    linear_scale: bool = False
    output_scale: float | None = None
    temperature: TemperatureParts | None = None
    clamp: bool = False
    alibi: float | None = None
    alibi_layers: int | None = None
    softcap: float | None = None
    sinks: Presence = Presence.NEVER
    output_gate: OutputGate | None = None
    causal: bool = True
    relative_buckets: bool = False
    output: str = "attn_output"
    gate_function: GateFunction = GateFunction.SIGMOID
    value_scale: bool = False
    indexer: IndexerParts | None = None
    value_norm: bool = False
    sub_norm: bool = False
    values_like_keys: bool = False
    shared_caches: bool = False
    own_caches: int | None = None


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


@dataclass(frozen=True, kw_only=True)
class HeadParts:
    """From the last hidden state to logits.

    Attributes:
        scale: what logit_scale does.
        scale_default: logit_scale where the file leaves it out or states 0.
        scale_width: likewise it is D / this; None = scale_default.
        softcap: final_logit_softcapping is read; the default, None = not read.
        silent: tokens that are never given: the first, and the one behind the last; None = there are none.
        norm: name of the last norm; None = there is none.
        generates: files predict tokens; otherwise they make embeddings alone.
    """

    scale: LogitScale = LogitScale.NONE
    scale_default: float = 1.0
    scale_width: int | None = None
    softcap: float | None = None
    silent: tuple[int, int] | None = None
    norm: str | None = "output_norm"
    generates: bool = True


@dataclass(frozen=True, kw_only=True)
class BiasParts:
    """Biases of projections, by the last part of the tensor's name. A projection named in neither tuple may have one.

    Attributes:
        required: projections that must have a bias.
        unused: projections whose bias, if a file has one, takes no part.
    """

    required: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
