"""Weights of a table of n-grams."""

from __future__ import annotations

from engine.model.building.source import TensorSource
from engine.model.config import NgramConfig
from engine.model.reading.ngrams import TABLE
from engine.model.weights import NgramWeights


def build_ngrams(source: TensorSource, prefix: str, config: NgramConfig) -> NgramWeights:
    """The table, and what the layer whose tensors' names begin with `prefix` makes of its rows."""
    tensors, width, read = source.tensors, source.width, config.rows * config.width
    streams = config.channels // width, width
    return NgramWeights(
        table=tensors.weight(TABLE, (tensors.shape(TABLE)[0], config.width)),
        key=source.linear(f"{prefix}.ple_key", config.channels, read),
        value=source.linear(f"{prefix}.ple_value", width, read),
        norm_key=source.norm(f"{prefix}.ple_norm_key", streams),
        norm_query=source.norm(f"{prefix}.ple_norm_query", streams),
        norm_conv=source.norm(f"{prefix}.ple_norm_conv", streams),
        conv1d=tensors.vector(f"{prefix}.ple_conv1d.weight", (config.channels, config.conv_width)),
    )
