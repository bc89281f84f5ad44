"""The launch plan of a loaded file, part by part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from engine.config import KvType
from engine.cuda.launch_plan.families import Card
from engine.cuda.launch_plan.layer import (
    CombinedPlan,
    LayerPlan,
    MixerPlan,
    leaves_behind,
    leaves_hidden,
    leaves_inside,
)
from engine.cuda.launch_plan.model import LaunchPlan, Settings
from engine.cuda.launch_plan.parts.attention import describe_attention
from engine.cuda.launch_plan.parts.compressed import describe_compressed
from engine.cuda.launch_plan.parts.feed_forward import FfnPlan, describe_ffn
from engine.cuda.launch_plan.parts.mixture import MoePlan
from engine.cuda.launch_plan.parts.mixture_parts import describe_moe
from engine.cuda.launch_plan.parts.ngrams import describe_ngrams
from engine.cuda.launch_plan.parts.norms import norm_of
from engine.cuda.launch_plan.parts.recurrent import describe_recurrent
from engine.cuda.launch_plan.parts.rwkv import ChannelMixPlan, describe_channel_mix
from engine.cuda.launch_plan.parts.skips import describe_skips
from engine.cuda.launch_plan.parts.streams import LaurelPlan, LayerInputPlan, PerLayerPlan, SpreadPlan
from engine.cuda.launch_plan.products import Chooser, Matrix
from engine.model.config import ChannelMixConfig, FfnConfig, MoeConfig
from engine.model.loader import LoadedModel
from engine.model.weights import LayerWeights

CROWD = 64
"""Slots of a runner beyond which long sequences of it are expected to run side by side."""


def describe(model: LoadedModel, card: tuple[int, int], settings: Settings) -> LaunchPlan:
    """The plan of a loaded file; needs no GPU.

    Args:
        model: the file.
        card: compute capability and number of multiprocessors.
        settings: of the runner.
    """
    config, weights = model.config, model.weights
    if not config.generates and settings.kv_type is KvType.Q8_0:
        settings = replace(settings, kv_type=KvType.F16)  # keys and values of whole texts are not kept
    chooser = Chooser(Card(*card), settings.deterministic)
    kept = _kept_caches(weights.layers)
    layers = [_layer(layer, chooser, settings, kept) for layer in weights.layers]
    skipped, skips = describe_skips(config.skip, weights.layers, weights.head_skip, chooser)
    beside = zip(layers, skipped, describe_ngrams(weights.layers, config.width, chooser), strict=True)
    layers = [replace(layer, mixer_skip=mixer, ffn_skip=ffn, ngrams=ngrams) for layer, (mixer, ffn), ngrams in beside]
    per_layer = None
    if weights.per_layer is not None:
        factor = 1.0 / math.sqrt(config.width)
        projected = chooser.projection([weights.per_layer.model_proj], factor=factor)
        per_layer = PerLayerPlan(Matrix.of(weights.per_layer.token_embd), projected, config.per_layer_width)
    spread = None
    if weights.spread is not None:
        assert config.streams is not None
        both = chooser.one_of(weights.spread.proj), chooser.one_of(weights.spread.unembd_proj)
        spread = SpreadPlan(config.streams.count, *both)
    output = chooser.projection([weights.head], factor=config.logit_scale) if config.generates else None
    output_norm = norm_of(weights.output_norm)
    takes = [*(layer.takes_operand for layer in layers[1:]), output is not None and output.takes_operand]
    norms = [*(layer.attn_norm for layer in layers[1:]), output_norm]
    leaves = [leaves_behind(layer, norm) and take for layer, norm, take in zip(layers, norms, takes, strict=True)]
    return LaunchPlan(
        card=chooser.card,
        settings=settings,
        width=config.width,
        vocab=config.vocab_size,
        token_embd=Matrix.of(weights.token_embd),
        position_embd=None if weights.position_embd is None else Matrix.of(weights.position_embd),
        embedding_norm=weights.embedding_norm is not None,
        layers=tuple(
            replace(
                layer,
                leaves_inside=leaves_inside(layer),
                leaves_hidden=leaves_hidden(layer, chooser.card.multiprocessors),
                leaves_behind=behind,
                takes_left=before,
            )
            for layer, behind, before in zip(layers, leaves, [False, *leaves], strict=False)
        ),
        output_norm=output_norm,
        output=output,
        softcap=config.logit_softcap is not None,
        token_types=weights.token_types is not None,
        per_layer=per_layer,
        silent=config.silent is not None,
        spread=spread,
        skips=skips,
    )


def _kept_caches(layers: Sequence[LayerWeights]) -> dict[int, int]:
    """For each layer whose cache later ones read, where its keys and values are in the rows of Activations.kept."""
    attended = [layer.config.attention_part for layer in layers]
    owners = {one.cache_layer for one in attended if one is not None and one.cache_layer is not None}
    found, at = {}, 0
    for owner in sorted(owners):
        config = attended[owner]
        assert config is not None
        found[owner] = at
        at += config.n_kv_heads * (config.key_width + config.value_width)
    return found


def _layer(layer: LayerWeights, chooser: Chooser, settings: Settings, kept: dict[int, int]) -> LayerPlan:
    config, scale = layer.config, layer.config.residual_scale
    # Where a norm follows, the result is scaled after it.
    mixed, fed = (scale if norm is None else 1.0 for norm in (layer.attn_post_norm, layer.ffn_post_norm))
    ffn: FfnPlan | MoePlan | ChannelMixPlan | None = None
    if layer.moe is not None:
        assert isinstance(config.ffn, MoeConfig)
        ffn = describe_moe(layer.moe, config.ffn, chooser, factor=fed)
    elif layer.ffn is not None:
        assert isinstance(config.ffn, FfnConfig)
        ffn = describe_ffn(layer.ffn, config.ffn, chooser, factor=fed)
    elif layer.channel_mix is not None:
        assert isinstance(config.ffn, ChannelMixConfig)
        ffn = describe_channel_mix(layer.channel_mix, config.ffn, chooser, factor=fed)
    layer_input = None
    if layer.layer_input is not None:
        own = layer.layer_input
        products = chooser.projection([own.inp_gate]), chooser.projection([own.proj])
        layer_input = LayerInputPlan(*products, in_streams=layer.streams is not None)
    laurel = None
    if layer.laurel is not None:
        laurel = LaurelPlan(chooser.projection([layer.laurel.left]), chooser.projection([layer.laurel.right]))
    return LayerPlan(
        index=layer.index,
        mixer=_mixer(layer, chooser, settings, kept, factor=mixed),
        ffn=ffn,
        attn_norm=norm_of(layer.attn_norm),
        attn_post_norm=norm_of(layer.attn_post_norm),
        ffn_norm=norm_of(layer.ffn_norm),
        ffn_post_norm=norm_of(layer.ffn_post_norm),
        parallel=layer.parallel and ffn is not None,
        attn_output_norm=layer.attn_output_norm is not None,
        attn_norm_2=layer.attn_norm_2 is not None,
        last_norm=(layer.layer_output_norm or layer.closing_norm) is not None,
        embedding_skip=layer.embedding_scale != 0.0,
        scales=layer.output_scale != 1.0,
        layer_input=layer_input,
        laurel=laurel,
        streams=layer.streams is not None,
    )


def _stretch(settings: Settings) -> int:
    """AttentionShape.stretch: what many sequences gain from longer ranges, one sequence loses."""
    if settings.max_sequences <= CROWD:
        return 1
    if settings.throughput:
        return 4
    return 2 if settings.kv_type is KvType.Q8_0 else 1


def _mixer(
    layer: LayerWeights, chooser: Chooser, settings: Settings, kept: dict[int, int], *, factor: float
) -> MixerPlan | None:
    attention = recurrent = None
    if (attended := layer.config.attention_part) is not None and attended.compressed is not None:
        return describe_compressed(attended, layer.attention, chooser, kv_type=settings.kv_type, factor=factor)
    if attended is not None:
        owner = layer.index if attended.cache_layer is None else attended.cache_layer
        parts = attended, layer.attention, chooser
        attention = describe_attention(
            *parts, kv_type=settings.kv_type, stretch=_stretch(settings), factor=factor, kept_at=kept.get(owner)
        )
    if (moved := layer.config.recurrent_part) is not None:
        assert layer.recurrent is not None
        recurrent = describe_recurrent(moved, layer.recurrent, chooser, factor=factor)
    if attention is not None and recurrent is not None:
        return CombinedPlan(attention, recurrent)
    return attention or recurrent
