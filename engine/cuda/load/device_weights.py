"""A model's weights on the GPU, as the bricks of a step use them. Each part keeps its piece of the launch plan."""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.attention.attention import LayerAttention
from engine.cuda.attention.attention_shape import AttentionShape
from engine.cuda.attention.heads import HeadSteps
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.experts.heads import HeadProducts
from engine.cuda.experts.moe import ExpertProducts
from engine.cuda.experts.moe_rows import RowExperts
from engine.cuda.experts.prefill import StackedExperts
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.indexer.indexer import PoolArrays
from engine.cuda.launch_plan.layer import LayerPlan
from engine.cuda.launch_plan.model import LaunchPlan
from engine.cuda.launch_plan.parts.attention import AttentionPlan
from engine.cuda.launch_plan.parts.feed_forward import FfnPlan
from engine.cuda.launch_plan.parts.indexer import IndexerPlan
from engine.cuda.launch_plan.parts.latent import HeadMatrices, LatentPlan
from engine.cuda.launch_plan.parts.mixture import MoePlan
from engine.cuda.launch_plan.parts.streams import PerLayerPlan
from engine.cuda.load.device_compressed import DeviceCompressed
from engine.cuda.load.device_products import DeviceProduct, DeviceProjection
from engine.cuda.load.device_recurrent import DeviceChannelMix, DeviceNgrams, DeviceRecurrent
from engine.cuda.load.device_skips import DeviceSkip
from engine.cuda.rows.parts import DeviceNorm, DeviceRope
from engine.cuda.rows.streams import DeviceStreams


@dataclass(frozen=True, eq=False)
class DeviceFfn:
    """A feed-forward part; see FfnPlan for which of its products are set.

    Attributes:
        act_scales: float32 (F,) that divides what the activation gives, or None. sub_norm: of what down reads.
        gate_bias, up_bias: float32 (F,) of a paired matrix, or None. Only products of prompts apply them.
    """

    plan: FfnPlan
    paired: DeviceProduct | None
    gate: DeviceProjection | None
    up: DeviceProjection | None
    down: DeviceProjection
    act_scales: DeviceArray | None = None
    gate_bias: DeviceArray | None = None
    up_bias: DeviceArray | None = None
    sub_norm: DeviceNorm | None = None

    @property
    def gate_up_bytes(self) -> int:
        """Packed size of gate and up."""
        paired = 0 if self.paired is None else self.paired.group.n_bytes
        return paired + sum(one.n_bytes for one in (self.gate, self.up) if one is not None)


@dataclass(frozen=True, eq=False)
class DeviceLatentExperts:
    """What experts read and give where that is not as wide as the model. norm: of their sum, or None."""

    down: DeviceProjection
    up: DeviceProjection
    norm: DeviceNorm | None


@dataclass(frozen=True, eq=False)
class DeviceMoe:
    """A mixture of experts.

    Attributes:
        selection_bias: float32 (E,) that joins the choice, or None.
        router: scores. shared, shared_gate: see MoePlan, likewise None.
        experts: one part per expert, where some step multiplies by single experts, else ().
        chosen, sharing, grouped: launchers of the families EXPERTS_CHOSEN, EXPERTS_SHARED and EXPERTS_GROUPED over the
            same memory; None where no step takes the family.
        expert_bytes: packed size of all experts.
        norm, router_norm: norms of what experts and router read, where they do not read what the layer's norm gives, or
            None. expert_post_norm, shared_post_norm: of what experts and the shared part give, or None.
        latent: products around the experts, or None. adjugates: experts that read what the others give, or ().
        token_experts: int32 (V, U), those that each token names, or None.
    """

    plan: MoePlan
    selection_bias: DeviceArray | None
    router: DeviceProjection
    experts: tuple[DeviceFfn, ...]
    shared: DeviceFfn | None
    shared_gate: DeviceProjection | None
    chosen: ExpertProducts | None
    sharing: RowExperts | None
    grouped: StackedExperts | None
    expert_bytes: int
    norm: DeviceNorm | None
    router_norm: DeviceNorm | None
    expert_post_norm: DeviceNorm | None
    shared_post_norm: DeviceNorm | None
    latent: DeviceLatentExperts | None
    adjugates: tuple[DeviceFfn, ...]
    token_experts: DeviceArray | None


@dataclass(frozen=True, eq=False)
class DeviceHeads:
    """A matrix for every head.

    Attributes:
        single: one by one. joined: all in one launch over the same memory; None where no step takes the family HEADS.
        n_bytes: packed size.
    """

    plan: HeadMatrices
    single: tuple[DeviceProjection, ...]
    joined: HeadProducts | None
    n_bytes: int


@dataclass(frozen=True, eq=False)
class DeviceLatent:
    """Latent attention before the cache; see LatentPlan for which of its products are set.

    Attributes:
        q_a_norm: norm of the compressed queries, or None. kv_a_norm: norm of the latent vector. k_norm: norm of the
            rotated part, or None.
        rope: rotation of the R columns.
    """

    plan: LatentPlan
    inputs: DeviceProjection
    q_a_norm: DeviceNorm | None
    q_b: DeviceProjection | None
    kv_a_norm: DeviceNorm
    k_b: DeviceHeads | None
    v_b: DeviceHeads | None
    kv_b: DeviceProjection | None
    rope: DeviceRope
    k_norm: DeviceNorm | None


@dataclass(frozen=True, eq=False)
class DeviceIndexer:
    """The indexer that a layer has of its own; see OwnIndexer for its products.

    Attributes:
        q_norm: norm of each head's queries, or None. k_norm: of keys.
        rope: rotation of both, or None. rotated_last: of their last numbers, not the first.
        pool: what makes keys of blocks, or None.
    """

    plan: IndexerPlan
    inputs: DeviceProjection
    queries: DeviceProjection | None
    q_norm: DeviceNorm | None
    k_norm: DeviceNorm
    rope: DeviceRope | None
    rotated_last: bool
    pool: PoolArrays | None

    @property
    def raw_keys(self) -> bool:
        """Whether keys are cached as they are."""
        return self.plan.own is not None and self.plan.own.raw_keys

    @property
    def n_bytes(self) -> int:
        """Packed size of the matrices."""
        return self.inputs.n_bytes + (0 if self.queries is None else self.queries.n_bytes)


@dataclass(frozen=True, eq=False)
class DeviceAttention:
    """Attention of one layer. One of qkv and latent is set.

    Attributes:
        heads: what row kernels do to queries and keys; None where there is nothing.
        constants: what the attention kernels are given. output: the output projection.
        sub_norm: norm of what it reads, or None. softplus: of gates; else they are sigmoids.
        indexer: what scores positions, where the layer has an indexer of its own, or None.
    """

    plan: AttentionPlan
    qkv: DeviceProjection | None
    latent: DeviceLatent | None
    heads: HeadSteps | None
    constants: LayerAttention
    output: DeviceProjection
    sub_norm: DeviceNorm | None
    softplus: bool
    indexer: DeviceIndexer | None

    @property
    def shape(self) -> AttentionShape:
        """The heads."""
        return self.plan.shape


@dataclass(frozen=True, eq=False)
class DeviceCombined:
    """Attention and a recurrent mixer of one layer."""

    attention: DeviceAttention
    recurrent: DeviceRecurrent


DeviceMixer = DeviceAttention | DeviceCompressed | DeviceRecurrent | DeviceCombined
"""The part of a layer that reads other tokens; one class per class of launch_plan.layer.MixerPlan."""


@dataclass(frozen=True, eq=False)
class DeviceLayerInput:
    """What a token's own vector for a layer adds to the layer's result. post_norm: of what is added."""

    inp_gate: DeviceProjection
    proj: DeviceProjection
    post_norm: DeviceNorm


@dataclass(frozen=True, eq=False)
class DeviceLaurel:
    """The low-rank projections beside a mixer. post_norm: of what they give."""

    left: DeviceProjection
    right: DeviceProjection
    post_norm: DeviceNorm


@dataclass(frozen=True, eq=False)
class DeviceSpread:
    """A residual stream of several vectors. proj, unembd_proj: a product for each stream but the first."""

    proj: tuple[DeviceProjection, ...]
    unembd_proj: tuple[DeviceProjection, ...]
    active: int


@dataclass(frozen=True, eq=False)
class DevicePerLayer:
    """Vectors of tokens for each layer; see PerLayerPlan. proj_norm: of each layer's part of model_proj's result."""

    plan: PerLayerPlan
    token_embd: PackedMatrix
    model_proj: DeviceProjection
    proj_norm: DeviceNorm


@dataclass(frozen=True, eq=False)
class DeviceLayer:
    """One layer. At most one of ffn, moe and channel_mix is set; norms and the mixer may be None.

    residual_scale is part of projections whose results are added as they come; it is left for those with a norm behind
    them. embedding_scale: factor of the embeddings that are added to the result, 0 for none; output_scale: of it.
    mixer_skip, ffn_skip: what skips the two parts, where that is more than x; else None. ngrams: what is added to x
    before everything else, or None.
    """

    plan: LayerPlan
    attn_norm: DeviceNorm | None
    mixer: DeviceMixer | None
    attn_post_norm: DeviceNorm | None
    ffn_norm: DeviceNorm | None
    ffn: DeviceFfn | None
    moe: DeviceMoe | None
    ffn_post_norm: DeviceNorm | None
    residual_scale: float
    attn_output_norm: DeviceNorm | None = None
    attn_norm_2: DeviceNorm | None = None
    last_norm: DeviceNorm | None = None
    embedding_scale: float = 0.0
    output_scale: float = 1.0
    layer_input: DeviceLayerInput | None = None
    laurel: DeviceLaurel | None = None
    streams: DeviceStreams | None = None
    mixer_skip: DeviceSkip | None = None
    ffn_skip: DeviceSkip | None = None
    channel_mix: DeviceChannelMix | None = None
    ngrams: DeviceNgrams | None = None

    @property
    def index(self) -> int:
        """Number of the layer."""
        return self.plan.index

    @property
    def parallel(self) -> bool:
        """Whether the feed-forward part reads the layer's input."""
        return self.plan.parallel

    @property
    def attention_part(self) -> DeviceAttention | None:
        """The attention; None where the layer has none."""
        mixer = self.mixer.attention if isinstance(self.mixer, DeviceCombined) else self.mixer
        return mixer if isinstance(mixer, DeviceAttention) else None

    @property
    def recurrent_part(self) -> DeviceRecurrent | None:
        """The recurrent mixer; None where the layer has none."""
        mixer = self.mixer.recurrent if isinstance(self.mixer, DeviceCombined) else self.mixer
        return None if mixer is None or isinstance(mixer, (DeviceAttention, DeviceCompressed)) else mixer

    @property
    def compressed(self) -> DeviceCompressed | None:
        """The attention over compressed blocks; None where the layer has none."""
        return self.mixer if isinstance(self.mixer, DeviceCompressed) else None

    @property
    def attention(self) -> DeviceAttention:
        """The attention of a layer that is known to have it."""
        attention = self.attention_part
        assert attention is not None
        return attention

    @property
    def recurrent(self) -> DeviceRecurrent:
        """The recurrent mixer of a layer that is known to have one."""
        recurrent = self.recurrent_part
        assert recurrent is not None
        return recurrent


@dataclass(frozen=True, eq=False)
class DeviceWeights:
    """The whole model. token_embd is the head's own matrix where the file ties them.

    logit_scale is part of the output projection, which models that make embeddings alone have not. token_types: float32
    (D,), added to every token's vector. silent: the first token that is never given, and the one behind them.
    head_skip: what the head reads of several streams, where plan.skips is set.
    """

    plan: LaunchPlan
    token_embd: PackedMatrix
    embedding_scale: float
    position_embd: PackedMatrix | None
    embedding_norm: DeviceNorm | None
    layers: tuple[DeviceLayer, ...]
    output_norm: DeviceNorm | None
    output: DeviceProjection | None
    logit_softcap: float | None
    token_types: DeviceArray | None
    per_layer: DevicePerLayer | None
    silent: tuple[int, int] | None
    spread: DeviceSpread | None
    head_skip: DeviceSkip | None
