"""The whole model's configuration: embedding, layers, head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from engine.model.architecture import Architecture
from engine.model.config import LayerConfig, ModelConfig, NormKind, ResidualKind, SkipConfig, StackSkip
from engine.model.parts import LogitScale, Parallel, Presence
from engine.model.reading.ffn import read_ffns
from engine.model.reading.metadata import LIMIT
from engine.model.reading.mixers import read_mixers
from engine.model.reading.ngrams import read_ngrams
from engine.model.reading.pooling import read_pooling, read_rank
from engine.model.reading.skips import read_skip
from engine.model.reading.source import Source, open_source
from engine.model.reading.streams import (
    has_output_scale,
    read_laurel_rank,
    read_output_factor,
    read_per_layer_width,
    read_streams,
)
from engine.model.reading.unread_keys import check_unread

_RMS_EPSILON = "attention.layer_norm_rms_epsilon"

MOST_LAYERS = 4096
"""Most layers that a token may pass, several times the same ones included."""


def read_config(
    architecture: Architecture,
    metadata: Mapping[str, Any],
    *,
    vocab_size: int,
    tensors: Mapping[str, Any],
    run_context: Callable[[int], int],
    strict: bool = False,
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Hyper-parameters of a file, and the unknown keys of this family.

    Args:
        architecture: what the family reads.
        metadata: all metadata of the file.
        vocab_size: rows of token_embd.
        tensors: the file's tensors by name: their number bounds block_count, and optional parts show in their names.
        run_context: from the trained context length to the one of the run.
        strict: refuse unknown keys.

    Raises:
        ModelFileError: a key is missing, of the wrong type, or out of range.
        UnsupportedModelError: a value asks for something that is not supported, or with `strict` a key is unknown.
    """
    source = open_source(architecture, metadata, tensors, run_context)
    name, skip = metadata.get("general.name"), read_skip(source)
    layers = _layers(source, skip)
    causal = all(layer.attention_part is None or layer.attention_part.causal for layer in layers)
    config = ModelConfig(
        architecture=architecture.name,
        name=name if isinstance(name, str) else "",
        width=source.width,
        vocab_size=vocab_size,
        context_length=source.context_length,
        norm=_norm_kind(source),
        norm_epsilon=_norm_epsilon(source),
        layers=layers,
        embedding_scale=_embedding_scale(source),
        learned_positions=_is_there(source, architecture.embedding.positions, "position_embd.weight"),
        logit_scale=_logit_scale(source),
        logit_softcap=source.default("final_logit_softcapping", architecture.head.softcap),
        generates=architecture.head.generates and causal,
        token_types=_is_there(source, architecture.embedding.token_types, "token_types.weight"),
        pooling=read_pooling(source),
        rank=read_rank(source),
        norms_behind=architecture.layer.behind_stated and source.read.flag("swin_norm", False),
        silent=_silent(source, vocab_size),
        skip=skip,
        next_token_layers=source.n_blocks - source.n_layers,
        per_layer_width=read_per_layer_width(source),
        streams=read_streams(source),
    )
    return config, check_unread(architecture, source.read, config, strict=strict)


def _silent(source: Source, vocab_size: int) -> tuple[int, int] | None:
    silent = source.architecture.head.silent
    return None if silent is None else (min(silent[0], vocab_size), min(silent[1], vocab_size))


def _norm_kind(source: Source) -> NormKind:
    norm = source.architecture.norm
    if norm.either_kind and source.read.number(_RMS_EPSILON, 0.0, low=0.0, high=1.0):
        return NormKind.RMS
    return norm.kind


def _norm_epsilon(source: Source) -> float:
    norm = source.architecture.norm
    key = "layer_norm_epsilon" if _norm_kind(source) is NormKind.LAYER else "layer_norm_rms_epsilon"
    if norm.either_epsilon and not source.read.has(f"attention.{key}"):
        key = "layer_norm_epsilon"
    return source.read.number(f"attention.{key}", norm.epsilon, low=0.0, high=1.0)


def _layers(source: Source, skip: SkipConfig | None) -> tuple[LayerConfig, ...]:
    ffns, scale = read_ffns(source), _residual_scale(source)
    has_mixer = [not (source.architecture.layer.one_part and ffn is not None) for ffn in ffns]
    if source.architecture.layer.without_heads:
        has_mixer = [heads > 0 for heads in source.read.per_layer("attention.head_count", source.n_blocks, low=0)]
    mixers = read_mixers(source, has_mixer[: source.n_layers])
    per_layer_width, streams = read_per_layer_width(source), read_streams(source)
    ngrams = read_ngrams(source, skip)
    layers = tuple(
        LayerConfig(
            index=index,
            mixer=mixer,
            ffn=ffn,
            residual=_residual(source, index),
            residual_scale=scale,
            output_norms=source.architecture.layer.output_norms,
            embedding_skip=source.architecture.layer.embedding_skip,
            laurel_rank=read_laurel_rank(source, index),
            per_layer_width=per_layer_width,
            output_scale=has_output_scale(source, index),
            output_factor=read_output_factor(source, index),
            streams=streams,
            ngrams=ngrams[index],
        )
        for index, (mixer, ffn) in enumerate(zip(mixers, ffns, strict=True))
    )
    if isinstance(skip, StackSkip):
        return tuple(replace(layer, block=skip.block(layer.index)) for layer in layers)
    return _passes(source, layers) if source.architecture.layer.loops else layers


def _passes(source: Source, layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
    """The layers as often as tokens pass them; a pass that is not the last ends with a norm."""
    count, read = len(layers), source.read
    loops = read.integer("num_loops", 1, high=max(1, MOST_LAYERS // count))
    closed = not read.flag("skip_loop_final_norm", False)
    first = (*layers[:-1], replace(layers[-1], closing_norm=closed and loops > 1))
    later = (
        replace(layer, index=loop * count + layer.index, block=layer.index, closing_norm=closes and loop < loops - 1)
        for loop in range(1, loops)
        for layer, closes in ((layer, layer.closing_norm) for layer in first)
    )
    return (*first, *later)


def _residual(source: Source, index: int) -> ResidualKind:
    parallel = source.architecture.layer.parallel
    if parallel is Parallel.STATED:
        is_parallel = source.read.flag("use_parallel_residual", True)
    elif parallel is Parallel.WITHOUT_NORM:
        is_parallel = f"{source.prefix}.{index}.ffn_norm.weight" not in source.tensors
    else:
        is_parallel = parallel is Parallel.ALWAYS
    return ResidualKind.PARALLEL if is_parallel else ResidualKind.SEQUENTIAL


def _residual_scale(source: Source) -> float:
    base = source.architecture.layer.residual_scale
    if base is None:
        return 1.0
    default = base / math.sqrt(source.n_layers)
    return source.read.number("residual_scale", default, low=-LIMIT, high=LIMIT) or default or 1.0


def _embedding_scale(source: Source) -> float:
    embedding = source.architecture.embedding
    if embedding.sqrt_width:
        return math.sqrt(source.width)
    return source.default("embedding_scale", embedding.scale) or embedding.scale or 1.0


def _is_there(source: Source, presence: Presence, tensor: str) -> bool:
    if presence is Presence.OPTIONAL:
        return tensor in source.tensors
    return presence is Presence.ALWAYS


def _logit_scale(source: Source) -> float:
    head = source.architecture.head
    if head.scale is LogitScale.NONE:
        return 1.0
    default = head.scale_default if head.scale_width is None else source.width / head.scale_width
    scale = source.read.number("logit_scale", default, low=-LIMIT, high=LIMIT) or default
    return 1.0 / scale if head.scale is LogitScale.DIVIDES else scale
