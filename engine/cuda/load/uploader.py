"""Brings a model's tensors to the GPU, packed and grouped as its launch plan says.

Owns the way of every weight to the device. Must not decide what is launched together, and must not know of batches.
"""

from __future__ import annotations

import numpy as np

from engine.cuda.attention.attention import LayerAttention
from engine.cuda.attention.heads import HeadSteps
from engine.cuda.experts.heads import HeadProducts
from engine.cuda.indexer.indexer import PoolArrays
from engine.cuda.indexer.plan import Pool
from engine.cuda.launch_plan.families import Family
from engine.cuda.launch_plan.layer import CombinedPlan, LayerPlan, MixerPlan
from engine.cuda.launch_plan.model import LaunchPlan
from engine.cuda.launch_plan.parts.attention import AttentionPlan
from engine.cuda.launch_plan.parts.compressed import CompressedPlan
from engine.cuda.launch_plan.parts.indexer import IndexerPlan
from engine.cuda.launch_plan.parts.latent import HeadMatrices, LatentPlan
from engine.cuda.launch_plan.parts.mixture import MoePlan
from engine.cuda.launch_plan.parts.recurrent_plan import RecurrentPlan
from engine.cuda.launch_plan.parts.rwkv import ChannelMixPlan
from engine.cuda.launch_plan.parts.skips import SkipPlan
from engine.cuda.launch_plan.parts.streams import LaurelPlan, LayerInputPlan, PerLayerPlan, SpreadPlan
from engine.cuda.launch_plan.products import Projection
from engine.cuda.load.compressed_upload import CompressedUploader
from engine.cuda.load.device_recurrent import DeviceNgrams
from engine.cuda.load.device_skips import DeviceSkip
from engine.cuda.load.device_weights import (
    DeviceAttention,
    DeviceCombined,
    DeviceHeads,
    DeviceIndexer,
    DeviceLatent,
    DeviceLaurel,
    DeviceLayer,
    DeviceLayerInput,
    DeviceMixer,
    DevicePerLayer,
    DeviceSpread,
    DeviceWeights,
)
from engine.cuda.load.feed_forward_upload import FeedForwardUploader
from engine.cuda.load.recurrent_upload import RecurrentUploader
from engine.cuda.load.tensor_index import TensorIndex
from engine.cuda.rows.streams import DeviceStreams
from engine.gguf.quants import dequantize
from engine.model.config import AltUpConfig, AttentionConfig, GateFunction
from engine.model.loader import LoadedModel
from engine.model.relative import FARTHEST, relative_buckets
from engine.model.rope import RopeTable
from engine.model.weights import (
    AttentionWeights,
    BankedSkipWeights,
    Float32Array,
    GatedSkipWeights,
    IndexerWeights,
    LatentWeights,
    LaurelWeights,
    LayerInputWeights,
    LayerWeights,
    Linear,
    MeanSkipWeights,
    MixedSkipWeights,
    PerLayerWeights,
    SkipWeights,
    StackSkipWeights,
    StreamWeights,
)


def _gains(bias: Float32Array) -> Float32Array:
    """Learned biases of kinds of distance (buckets, H) as (H, 2 * FARTHEST + 1), by the distance key - query."""
    kinds = relative_buckets(np.arange(-FARTHEST, FARTHEST + 1), len(bias))
    return np.ascontiguousarray(bias[kinds].T)


def _expanded(linear: Linear) -> Float32Array:
    """A small matrix as float32."""
    weight = linear.weight
    matrix = dequantize(weight.raw, weight.type).reshape(weight.shape) * np.float32(linear.scale)
    return np.asarray(matrix, np.float32)


class Uploader(RecurrentUploader, CompressedUploader, FeedForwardUploader):
    """Uploads the parts of a model."""

    def model(self, model: LoadedModel, plan: LaunchPlan) -> DeviceWeights:
        """Uploads everything; returns once it is all packed."""
        config, weights = model.config, model.weights
        self._plan, self._tensors = plan, TensorIndex(weights)
        with self._stream:
            result = DeviceWeights(
                plan=plan,
                token_embd=self.matrix(weights.token_embd),
                embedding_scale=config.embedding_scale,
                position_embd=None if weights.position_embd is None else self.matrix(weights.position_embd),
                embedding_norm=self.norm(weights.embedding_norm),
                layers=tuple(self._layer(*pair) for pair in zip(plan.layers, weights.layers, strict=True)),
                output_norm=self.norm(weights.output_norm),
                output=None if plan.output is None else self.projection(plan.output),
                logit_softcap=config.logit_softcap,
                token_types=self.vector(weights.token_types),
                per_layer=None if plan.per_layer is None else self._per_layer(plan.per_layer, weights.per_layer),
                silent=config.silent,
                head_skip=None if plan.skips is None else self._skip(plan.skips.head, weights.head_skip),
                spread=None if plan.spread is None else self._spread(plan.spread, config.streams),
            )
        self._stream.synchronize()
        return result

    # ---- parts -----------------------------------------------------------------------------------------------

    def _layer(self, plan: LayerPlan, layer: LayerWeights) -> DeviceLayer:
        ffn = moe = channel_mix = None
        if isinstance(plan.ffn, MoePlan):
            assert layer.moe is not None
            moe = self._moe(plan.ffn, layer.moe)
        elif isinstance(plan.ffn, ChannelMixPlan):
            assert layer.channel_mix is not None
            channel_mix = self._channel_mix(plan.ffn, layer.channel_mix)
        elif plan.ffn is not None:
            assert layer.ffn is not None
            ffn = self._ffn(plan.ffn, layer.ffn)
        return DeviceLayer(
            plan=plan,
            attn_norm=self.norm(layer.attn_norm),
            mixer=self._mixer(plan.mixer, layer),
            attn_post_norm=self.norm(layer.attn_post_norm),
            ffn_norm=self.norm(layer.ffn_norm),
            ffn=ffn,
            moe=moe,
            ffn_post_norm=self.norm(layer.ffn_post_norm),
            residual_scale=layer.config.residual_scale,
            attn_output_norm=self.norm(layer.attn_output_norm),
            attn_norm_2=self.norm(layer.attn_norm_2),
            last_norm=self.norm(layer.layer_output_norm or layer.closing_norm),
            embedding_scale=layer.embedding_scale,
            output_scale=layer.output_scale,
            mixer_skip=self._skip(plan.mixer_skip, layer.mixer_skip),
            ffn_skip=self._skip(plan.ffn_skip, layer.ffn_skip),
            laurel=None if plan.laurel is None else self._laurel(plan.laurel, layer.laurel),
            streams=None if layer.streams is None else self._streams(layer.streams, layer.config.streams),
            channel_mix=channel_mix,
            layer_input=None if plan.layer_input is None else self._layer_input(plan.layer_input, layer.layer_input),
            ngrams=self._ngrams_of(plan, layer),
        )

    def _ngrams_of(self, plan: LayerPlan, layer: LayerWeights) -> DeviceNgrams | None:
        if plan.ngrams is None:
            return None
        assert layer.ngrams is not None
        assert layer.config.ngrams is not None
        return self._ngrams(plan.ngrams, layer.config.ngrams, layer.ngrams)

    def _per_layer(self, plan: PerLayerPlan, weights: PerLayerWeights | None) -> DevicePerLayer:
        assert weights is not None
        norm = self.norm(weights.proj_norm)
        assert norm is not None
        return DevicePerLayer(plan, self.matrix(weights.token_embd), self.projection(plan.model_proj), norm)

    def _skip(self, plan: SkipPlan | None, weights: SkipWeights | None) -> DeviceSkip | None:
        if plan is None or weights is None:
            return None
        inner = tuple(self.projection(one) for one in plan.inner)
        if isinstance(weights, MeanSkipWeights):
            return DeviceSkip(plan, None)
        norm = self.norm(weights.score if isinstance(weights, BankedSkipWeights) else weights.norm)
        if isinstance(weights, (GatedSkipWeights, MixedSkipWeights)):
            return DeviceSkip(plan, norm, inner, self.vector(weights.factor), self.vector(weights.base))
        init = self.vector(weights.init) if isinstance(weights, StackSkipWeights) else None
        return DeviceSkip(plan, norm, inner, init=init)

    def _spread(self, plan: SpreadPlan, config: AltUpConfig | None) -> DeviceSpread:
        assert config is not None
        places = range(plan.count - 1)
        proj = tuple(self.projection(plan.proj, place) for place in places)
        unembd_proj = tuple(self.projection(plan.unembd_proj, place) for place in places)
        return DeviceSpread(proj, unembd_proj, config.active)

    def _streams(self, weights: StreamWeights, config: AltUpConfig | None) -> DeviceStreams:
        assert config is not None
        assert weights.router_norm.weight is not None
        router = _expanded(weights.router) * weights.router_norm.weight
        return DeviceStreams(
            count=config.count,
            active=config.active,
            router=self.vector(router / np.float32(router.shape[1])),
            epsilon=weights.router_norm.epsilon,
            predict=self.vector(_expanded(weights.predict)),
            correct=self.vector(_expanded(weights.correct)),
            scale=self.vector(weights.scale),
        )

    def _laurel(self, plan: LaurelPlan, weights: LaurelWeights | None) -> DeviceLaurel:
        assert weights is not None
        norm = self.norm(weights.post_norm)
        assert norm is not None
        return DeviceLaurel(self.projection(plan.left), self.projection(plan.right), norm)

    def _layer_input(self, plan: LayerInputPlan, weights: LayerInputWeights | None) -> DeviceLayerInput:
        assert weights is not None
        norm = self.norm(weights.post_norm)
        assert norm is not None
        return DeviceLayerInput(self.projection(plan.inp_gate), self.projection(plan.proj), norm)

    def _mixer(self, plan: MixerPlan | None, layer: LayerWeights) -> DeviceMixer | None:
        if plan is None:
            return None
        if isinstance(plan, CombinedPlan):
            assert layer.recurrent is not None
            attention = self._attention(plan.attention, layer.config.attention, layer.attention)
            return DeviceCombined(attention, self._recurrent(plan.recurrent, layer.recurrent))
        if isinstance(plan, RecurrentPlan):
            assert layer.recurrent is not None
            return self._recurrent(plan, layer.recurrent)
        if isinstance(plan, CompressedPlan):
            return self._compressed(plan, layer.config.attention, layer.attention)
        return self._attention(plan, layer.config.attention, layer.attention)

    def _attention(self, plan: AttentionPlan, config: AttentionConfig, weights: AttentionWeights) -> DeviceAttention:
        rotates = not plan.rotates and plan.latent is None  # in the attention kernels
        rope = weights.rope if rotates else None
        q_norm, k_norm = (self.norm(norm) if plan.folds_norms else None for norm in (weights.q_norm, weights.k_norm))
        temperature = config.temperature
        constants = LayerAttention(
            scale=config.scale,
            inv_freq=None if rope is None else self.vector(rope.inv_freq, np.float64),
            rope_scale=1.0 if rope is None else rope.magnitude,
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            norm_eps=1e-6 if q_norm is None else q_norm.epsilon,
            window=config.window or -(config.chunk or 0),
            temperature=0.0 if temperature is None else temperature.scale,
            temperature_length=1 if temperature is None else temperature.length,
            temperature_offset=0 if temperature is None else temperature.offset,
            softcap=config.softcap or 0.0,
            sinks=self.vector(weights.sinks),
            slopes=self.vector(
                weights.alibi_slopes if weights.relative_bias is None else _gains(weights.relative_bias)
            ),
        )
        heads = None
        if plan.prepares:
            heads = HeadSteps(
                clamp=config.clamp,
                rope=self._rope(weights.rope) if plan.rotates else None,
                q_norm=self.norm(weights.q_norm) if plan.q_norm else None,
                k_norm=self.norm(weights.k_norm) if plan.k_norm else None,
                v_norm=self.norm(weights.v_norm) if plan.v_norm else None,
                kind=config.qk_norm,
            )
        latent = None
        if plan.latent is not None:
            assert weights.latent is not None
            latent = self._latent(plan.latent, weights.latent, weights.rope)
        return DeviceAttention(
            plan=plan,
            qkv=None if plan.qkv is None else self.projection(plan.qkv),
            latent=latent,
            heads=heads,
            constants=constants,
            output=self.projection(plan.output),
            sub_norm=self.norm(weights.sub_norm),
            softplus=config.gate_function is GateFunction.SOFTPLUS,
            indexer=self._indexer(plan.indexer, config, weights.indexer),
        )

    def _indexer(
        self, plan: IndexerPlan | None, config: AttentionConfig, weights: IndexerWeights | None
    ) -> DeviceIndexer | None:
        if plan is None or plan.own is None:
            return None
        assert weights is not None
        assert config.indexer is not None
        own, k_norm = plan.own, self.norm(weights.k_norm)
        assert k_norm is not None
        rope, pool = None if weights.rope is None else self._rope(weights.rope), None
        if plan.shape.pool is Pool.GATES:
            assert weights.ape is not None
            pool = PoolArrays(self.vector(weights.ape), None, 0.0, None, 1.0)
        elif plan.shape.pool is Pool.MEAN:
            turned = (None, 1.0) if rope is None else (rope.inv_freq, rope.scale)
            pool = PoolArrays(None, k_norm.weight, k_norm.epsilon, *turned)
        return DeviceIndexer(
            plan=plan,
            inputs=self.projection(own.inputs),
            queries=None if own.queries is None else self.projection(own.queries),
            q_norm=self.norm(weights.q_norm),
            k_norm=k_norm,
            rope=rope,
            rotated_last=config.indexer.rotated_last,
            pool=pool,
        )

    def _latent(self, plan: LatentPlan, weights: LatentWeights, rope: RopeTable | None) -> DeviceLatent:
        kv_a_norm = self.norm(weights.kv_a_norm)
        assert kv_a_norm is not None
        return DeviceLatent(
            plan=plan,
            inputs=self.projection(plan.inputs),
            q_a_norm=self.norm(weights.q_a_norm),
            q_b=None if plan.q_b is None else self.projection(plan.q_b),
            kv_a_norm=kv_a_norm,
            k_b=None if plan.k_b is None else self._heads(plan.k_b),
            v_b=None if plan.v_b is None else self._heads(plan.v_b),
            kv_b=None if plan.kv_b is None else self.projection(plan.kv_b),
            rope=self._rope(rope),
            k_norm=self.norm(weights.k_norm),
        )

    def _heads(self, plan: HeadMatrices) -> DeviceHeads:
        n, alone = plan.heads, Projection((plan.single,), plan.single.width, plan.single.columns)
        if Family.HEADS not in plan.families.used:
            single = tuple(self.projection(alone, head) for head in range(n))
            return DeviceHeads(plan, single, None, sum(one.n_bytes for one in single))
        packed = self._stack(plan.stack)
        views = tuple(self._view(alone, packed, head, n) for head in range(n))
        joined = HeadProducts(packed, n, self._plan.decode_rows)
        return DeviceHeads(plan, views, joined, int(packed.data.nbytes))
