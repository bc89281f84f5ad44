"""Weights of what some families do with the residual stream beside the parts of a layer."""

from __future__ import annotations

from engine.model.building.source import TensorSource
from engine.model.config import AltUpConfig, LayerConfig
from engine.model.weights import LaurelWeights, LayerInputWeights, PerLayerWeights, SpreadWeights, StreamWeights


def build_per_layer(source: TensorSource) -> PerLayerWeights | None:
    """The model's weights of ModelConfig.per_layer_width."""
    config, width = source.config, source.width
    if not config.per_layer_width:
        return None
    rows = config.per_layer_width * config.n_layers
    return PerLayerWeights(
        token_embd=source.tensors.weight("per_layer_token_embd.weight", (config.vocab_size, rows)),
        model_proj=source.linear("per_layer_model_proj", rows, width),
        proj_norm=source.norm("per_layer_proj_norm", (config.per_layer_width,)),
    )


def build_layer_input(source: TensorSource, prefix: str, width: int) -> LayerInputWeights | None:
    """The same of a layer."""
    if not width:
        return None
    return LayerInputWeights(
        inp_gate=source.linear(f"{prefix}.inp_gate", width, source.width),
        proj=source.linear(f"{prefix}.proj", source.width, width),
        post_norm=source.norm(f"{prefix}.post_norm", (source.width,)),
    )


def build_spread(source: TensorSource) -> SpreadWeights | None:
    """The model's weights of AltUpConfig."""
    streams, width = source.config.streams, source.width
    if streams is None:
        return None
    return SpreadWeights(
        proj=source.tensors.experts("altup_proj", streams.count - 1, width, width),
        unembd_proj=source.tensors.experts("altup_unembd_proj", streams.count - 1, width, width),
    )


def build_streams(source: TensorSource, prefix: str, streams: AltUpConfig | None) -> StreamWeights | None:
    """The same of a layer."""
    if streams is None:
        return None
    count = streams.count
    return StreamWeights(
        router=source.linear(f"{prefix}.altup_router", count, source.width),
        router_norm=source.norm(f"{prefix}.altup_router_norm", (source.width,)),
        predict=source.linear(f"{prefix}.altup_predict_coef", count * count, count),
        correct=source.linear(f"{prefix}.altup_correct_coef", count, count),
        scale=source.tensors.vector(f"{prefix}.altup_correct_scale.weight", (source.width,)),
    )


def build_laurel(source: TensorSource, prefix: str, rank: int) -> LaurelWeights | None:
    """The weights of LayerConfig.laurel_rank."""
    if not rank:
        return None
    return LaurelWeights(
        left=source.linear(f"{prefix}.laurel_l", rank, source.width),
        right=source.linear(f"{prefix}.laurel_r", source.width, rank),
        post_norm=source.norm(f"{prefix}.laurel_post_norm", (source.width,)),
    )


def build_output_scale(source: TensorSource, prefix: str, layer: LayerConfig) -> float:
    """The number that multiplies what a layer gives."""
    if not layer.output_scale:
        return layer.output_factor
    return layer.output_factor * float(source.tensors.vector(f"{prefix}.layer_output_scale.weight", (1,))[0])
