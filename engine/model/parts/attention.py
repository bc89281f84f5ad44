"""Attention as declarations name it: windows, temperatures, norms of queries and keys, indexers, gates.

Read by engine/model/reading/attention/.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from engine.model.config import GateFunction, IndexerKind, NormKind, OutputGate, QkNorm, QkWeights, RopeStyle
from engine.model.parts.presence import Presence


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
        compressed: one key per position, which is its value too, in a window, and compressed blocks of earlier ones.
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
    compressed: bool = False
    values_like_keys: bool = False
    shared_caches: bool = False
    own_caches: int | None = None
