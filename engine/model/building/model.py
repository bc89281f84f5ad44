"""The whole model's weights: embedding, layers, head."""

from __future__ import annotations

from dataclasses import replace

from engine.model.architecture import Architecture
from engine.model.building.attention import build_attention
from engine.model.building.ffn import build_ffn, build_moe
from engine.model.building.ngrams import build_ngrams
from engine.model.building.pooling import build_pooling
from engine.model.building.positions import PositionTables
from engine.model.building.recurrent import build_recurrent
from engine.model.building.rwkv import build_channel_mix
from engine.model.building.skips import build_head_skip, build_part_skip
from engine.model.building.source import TensorSource
from engine.model.building.streams import (
    build_laurel,
    build_layer_input,
    build_output_scale,
    build_per_layer,
    build_spread,
    build_streams,
)
from engine.model.building.tensors import TensorTable
from engine.model.config import (
    AttentionConfig,
    ChannelMixConfig,
    CombinedConfig,
    FfnConfig,
    LayerConfig,
    MixerConfig,
    ModelConfig,
    MoeConfig,
    StackSkip,
)
from engine.model.weights import (
    CombinedWeights,
    LayerWeights,
    Linear,
    MixerWeights,
    ModelWeights,
    Norm,
    NormedSkipWeights,
    Weight,
)


def build_weights(architecture: Architecture, config: ModelConfig, tensors: TensorTable) -> ModelWeights:
    """Ask for the tensors of each part in turn.

    Raises:
        UnsupportedModelError: a tensor is missing, or of another shape or type than needed.
        ModelFileError: a tensor holds impossible values.
    """
    source = TensorSource(architecture, config, tensors)
    positions = PositionTables(source)
    width = config.width
    token_embd = tensors.weight("token_embd.weight", (config.vocab_size, width))
    position_embd = None
    if config.learned_positions:
        position_embd = tensors.weight("position_embd.weight", (config.context_length, width))
    token_types = tensors.row("token_types.weight", width) if config.token_types else None
    embedding_norm = source.norm("token_embd_norm", (width,)) if architecture.embedding.norm else None
    if architecture.embedding.bare_norm:
        embedding_norm = Norm(config.norm, config.norm_epsilon, None)
    head_norm = architecture.head.norm
    output_norm = None if head_norm is None else source.norm(head_norm, (width,))
    built: dict[int, LayerWeights] = {}
    layers: list[LayerWeights] = []
    for layer in config.layers:
        number = layer.index if layer.block is None else layer.block
        if number not in built:
            built[number] = _layer(source, positions, layer, number)
        weights = built[number]
        if isinstance(config.skip, StackSkip):
            mixer_skip, ffn_skip = (build_part_skip(source, layer.index, part, ()) for part in ("attn", "ffn"))
            weights = replace(weights, mixer_skip=mixer_skip, ffn_skip=ffn_skip)
        layers.append(replace(weights, config=layer, closing_norm=output_norm if layer.closing_norm else None))
    head_skip = build_head_skip(source)
    tied = config.generates and not tensors.has("output.weight")
    pooling = build_pooling(source)
    tensors.ignore(architecture.ignored_tensors)
    tensors.ignore_layers(range(config.n_layers, config.n_layers + config.next_token_layers))
    return ModelWeights(
        token_embd=token_embd,
        layers=tuple(layers),
        output_norm=output_norm,
        output=_output(source, token_embd, tied=tied),
        tied=tied,
        embedding_norm=embedding_norm,
        position_embd=position_embd,
        per_layer=build_per_layer(source),
        spread=build_spread(source),
        token_types=token_types,
        pooling=pooling,
        head_skip=head_skip,
    )


def _output(source: TensorSource, token_embd: Weight, *, tied: bool) -> Linear | None:
    tensors, vocab_size = source.tensors, source.config.vocab_size
    if not source.config.generates:  # it may still have the head that it was trained with
        tensors.ignore(("output.weight", "output.bias", "output.scale"))
        return None
    if tied:
        return Linear(token_embd, tensors.optional_vector("output.bias", (vocab_size,)))
    return tensors.linear("output", vocab_size, source.width)


def _layer(source: TensorSource, positions: PositionTables, layer: LayerConfig, number: int) -> LayerWeights:
    """The layer of this number in the file."""
    parts = source.architecture.layer
    prefix = f"{parts.prefix}.{number}"
    has_mixer, has_ffn, behind = layer.mixer is not None, layer.ffn is not None, parts.post_epsilon
    mixer_skip = build_part_skip(source, layer.index, "attn", parts.attn_norm) if has_mixer else None
    ffn_skip = build_part_skip(source, layer.index, "ffn", parts.ffn_norm) if has_ffn else None
    attn_norm, ffn_norm, after_mixer, after_ffn = _norm_names(source)
    normed_mixer = has_mixer and not isinstance(mixer_skip, NormedSkipWeights)  # which hold the norm
    normed_ffn = has_ffn and not isinstance(ffn_skip, NormedSkipWeights)
    optional = parts.attn_norm_optional
    return LayerWeights(
        config=layer,
        attn_norm=source.first_norm(prefix, attn_norm, optional=optional) if normed_mixer else None,
        mixer=_mixer(source, positions, prefix, layer.mixer),
        ffn_norm=source.first_norm(prefix, ffn_norm) if normed_ffn else None,
        ffn=build_ffn(source, prefix, layer.ffn) if isinstance(layer.ffn, FfnConfig) else None,
        moe=build_moe(source, prefix, layer.ffn) if isinstance(layer.ffn, MoeConfig) else None,
        channel_mix=build_channel_mix(source, prefix, layer.ffn) if isinstance(layer.ffn, ChannelMixConfig) else None,
        attn_post_norm=source.first_norm(prefix, after_mixer, epsilon=behind) if has_mixer else None,
        ffn_post_norm=source.first_norm(prefix, after_ffn, epsilon=behind) if has_ffn else None,
        attn_output_norm=source.first_norm(prefix, ("attn_output_norm",)) if layer.output_norms else None,
        attn_norm_2=source.first_norm(prefix, ("attn_norm_2",), optional=True) if layer.output_norms else None,
        layer_output_norm=source.first_norm(prefix, ("layer_output_norm",)) if layer.output_norms else None,
        mixer_skip=mixer_skip,
        ffn_skip=ffn_skip,
        ngrams=None if layer.ngrams is None else build_ngrams(source, prefix, layer.ngrams),
        embedding_scale=_embedding_scale(source, prefix) if layer.embedding_skip else 0.0,
        laurel=build_laurel(source, prefix, layer.laurel_rank),
        layer_input=build_layer_input(source, prefix, layer.per_layer_width),
        streams=build_streams(source, prefix, layer.streams),
        output_scale=build_output_scale(source, prefix, layer),
    )


def _norm_names(source: TensorSource) -> tuple[tuple[str, ...], ...]:
    """Names of the norms before mixer and feed-forward part, and after them."""
    parts = source.architecture.layer
    if source.config.norms_behind:
        return (), (), parts.attn_norm, parts.ffn_norm
    return parts.attn_norm, parts.ffn_norm, parts.attn_post_norm, parts.ffn_post_norm


def _embedding_scale(source: TensorSource, prefix: str) -> float:
    return float(source.tensors.vector(f"{prefix}.layer_output_scale.weight", (1,))[0])


def _mixer(
    source: TensorSource, positions: PositionTables, prefix: str, mixer: MixerConfig | None
) -> MixerWeights | None:
    if mixer is None:
        return None
    if isinstance(mixer, AttentionConfig):
        return build_attention(source, positions, prefix, mixer)
    if isinstance(mixer, CombinedConfig):
        attention = build_attention(source, positions, prefix, mixer.attention)
        return CombinedWeights(attention, build_recurrent(source, prefix, mixer.recurrent))
    return build_recurrent(source, prefix, mixer)
