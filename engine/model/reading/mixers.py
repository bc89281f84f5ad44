"""Which mixer each layer of a model has, from metadata."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import ModelFileError
from engine.model.config import CombinedConfig, MixerConfig
from engine.model.parts import Placement, RecurrentParts
from engine.model.reading.attention import read_attention
from engine.model.reading.recurrent import read_recurrent
from engine.model.reading.source import Source


def read_mixers(source: Source, has_mixer: Sequence[bool]) -> list[MixerConfig | None]:
    """The mixer of each layer; None where it has none.

    Args:
        source: the file.
        has_mixer: whether each layer has one.

    Raises:
        ModelFileError: a key is missing or has an impossible value.
    """
    parts = source.architecture.recurrent
    recurs = [False] * source.n_layers if parts is None else _recurs(source, parts)
    beside = parts is not None and parts.placement is Placement.BESIDE_ATTENTION
    attends = [has and (beside or not recurrent) for has, recurrent in zip(has_mixer, recurs, strict=True)]
    attention = read_attention(source, attends) if any(attends) else [None] * source.n_layers
    mixers: list[MixerConfig | None] = []
    for index, attending in enumerate(attention):
        recurrent = None
        if parts is not None and has_mixer[index] and recurs[index]:
            recurrent = read_recurrent(source, parts, index)
        if attending is not None and recurrent is not None:
            mixers.append(CombinedConfig(attention=attending, recurrent=recurrent))
        else:
            mixers.append(attending or recurrent)
    return mixers


def _recurs(source: Source, parts: RecurrentParts) -> list[bool]:
    """Whether each layer has the recurrent mixer."""
    read, n_layers = source.read, source.n_layers
    if parts.placement is Placement.WITHOUT_KEYS:
        return [heads == 0 for heads in read.per_layer("attention.head_count_kv", source.n_blocks, low=0)][:n_layers]
    if parts.placement is not Placement.LISTED:
        return [True] * n_layers
    key = "attention.recurrent_layers"
    if not read.is_list(key):
        interval = read.integer("full_attention_interval", parts.interval)
        return [(index + 1) % interval != 0 for index in range(n_layers)]
    flags = read.flags(key)
    if len(flags) < n_layers:
        raise ModelFileError(
            f"metadata key {source.name}.{key} holds {len(flags)} values; allowed are {n_layers}, one per layer"
        )
    return list(flags[:n_layers])
