"""The whole model's weights: embedding, layers, head."""

from __future__ import annotations

from engine.model.architecture import Architecture
from engine.model.building.attention import build_attention
from engine.model.building.ffn import build_ffn, build_moe
from engine.model.building.pooling import build_pooling
from engine.model.building.positions import PositionTables
from engine.model.building.recurrent import build_recurrent
from engine.model.building.source import TensorSource
from engine.model.building.tensors import TensorTable
from engine.model.config import (
    AttentionConfig,
    CombinedConfig,
    FfnConfig,
    LayerConfig,
    MixerConfig,
    ModelConfig,
    MoeConfig,
)
from engine.model.weights import CombinedWeights, LayerWeights, Linear, MixerWeights, ModelWeights, Weight


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
    layers = tuple(_layer(source, positions, layer) for layer in config.layers)
    output_norm = None if architecture.head.norm is None else source.norm(architecture.head.norm, (width,))
    tied = config.generates and not tensors.has("output.weight")
    pooling = build_pooling(source)
    tensors.ignore(architecture.ignored_tensors)
    tensors.ignore_layers(range(config.n_layers, config.n_layers + config.next_token_layers))
    return ModelWeights(
        token_embd=token_embd,
        layers=layers,
        output_norm=output_norm,
        output=_output(source, token_embd, tied=tied),
        tied=tied,
        embedding_norm=embedding_norm,
        position_embd=position_embd,
        token_types=token_types,
        pooling=pooling,
    )


def _output(source: TensorSource, token_embd: Weight, *, tied: bool) -> Linear | None:
    tensors, vocab_size = source.tensors, source.config.vocab_size
    if not source.config.generates:  # it may still have the head that it was trained with
        tensors.ignore(("output.weight", "output.bias", "output.scale"))
        return None
    if tied:
        return Linear(token_embd, tensors.optional_vector("output.bias", (vocab_size,)))
    return tensors.linear("output", vocab_size, source.width)


def _layer(source: TensorSource, positions: PositionTables, layer: LayerConfig) -> LayerWeights:
    parts = source.architecture.layer
    prefix = f"{parts.prefix}.{layer.index}"
    has_mixer, has_ffn = layer.mixer is not None, layer.ffn is not None
    return LayerWeights(
        config=layer,
        attn_norm=source.first_norm(prefix, parts.attn_norm, optional=parts.attn_norm_optional) if has_mixer else None,
        mixer=_mixer(source, positions, prefix, layer.mixer),
        ffn_norm=source.first_norm(prefix, parts.ffn_norm) if has_ffn else None,
        ffn=build_ffn(source, prefix, layer.ffn) if isinstance(layer.ffn, FfnConfig) else None,
        moe=build_moe(source, prefix, layer.ffn) if isinstance(layer.ffn, MoeConfig) else None,
        attn_post_norm=source.first_norm(prefix, parts.attn_post_norm) if has_mixer else None,
        ffn_post_norm=source.first_norm(prefix, parts.ffn_post_norm) if has_ffn else None,
        attn_output_norm=source.first_norm(prefix, ("attn_output_norm",)) if layer.output_norms else None,
        attn_norm_2=source.first_norm(prefix, ("attn_norm_2",), optional=True) if layer.output_norms else None,
        layer_output_norm=source.first_norm(prefix, ("layer_output_norm",)) if layer.output_norms else None,
    )


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
