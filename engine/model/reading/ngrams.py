"""The table of n-grams of a model, from metadata."""

from __future__ import annotations

from engine.errors import ModelFileError, UnsupportedModelError
from engine.model.config import NgramConfig, SkipConfig, most_streams
from engine.model.reading.source import Source

LONGEST, MOST_HEADS, WIDEST = 16, 64, 64
"""Tokens of an n-gram, heads of a length, and inputs of the convolution, at most."""

TABLE = "per_layer_token_embd.weight"


def read_ngrams(source: Source, skip: SkipConfig | None) -> list[NgramConfig | None]:
    """The table of each layer; None where it has none.

    Raises:
        ModelFileError: a key is missing or has an impossible value, or sizes contradict each other.
        UnsupportedModelError: several layers have one.
    """
    found: list[NgramConfig | None] = [None] * source.n_layers
    if not source.architecture.layer.ngrams or not source.read.has("ple.layers"):
        return found
    layers = source.read.integers("ple.layers", low=0, high=source.n_layers - 1)
    if len(layers) > 1:
        raise UnsupportedModelError(
            f"{source.name}.ple.layers lists {len(layers)} layers; supported is one layer with a table of n-grams"
        )
    for layer in layers:
        found[layer] = _table(source, most_streams(skip, source.n_layers))
    return found


def _table(source: Source, n_streams: int) -> NgramConfig:
    read = source.read
    length = read.integer("ple.ngram_size", low=2, high=LONGEST)
    heads = read.integer("ple.heads_per_ngram", high=MOST_HEADS)
    config = NgramConfig(
        length=length,
        heads=heads,
        width=read.integer("embedding_length_per_layer_input"),
        conv_width=read.integer("ple.conv_kernel", low=2, high=WIDEST),
        channels=n_streams * source.width,
        end=read.integer("ple.eos_token_id", low=0),
        multipliers=_numbers(source, "layer_multipliers", length, 0),
        offsets=_numbers(source, "head_offsets", (length - 1) * heads, 0),
        sizes=_numbers(source, "head_vocab_sizes", (length - 1) * heads, 1),
    )
    table = source.tensors.get(TABLE)
    rows = 0 if table is None else table.shape[0]
    needed = max(offset + size for offset, size in zip(config.offsets, config.sizes, strict=True))
    if rows < needed:
        raise ModelFileError(
            f"tensor {TABLE} has {rows} rows; its metadata (ple.head_offsets and ple.head_vocab_sizes) calls for "
            f"{needed} at least"
        )
    return config


def _numbers(source: Source, name: str, count: int, low: int) -> tuple[int, ...]:
    """The first `count` numbers of a list that may be longer."""
    values = source.read.integers(f"ple.{name}", low=low, high=2**64 - 1)
    if len(values) < count:
        raise ModelFileError(
            f"metadata key {source.name}.ple.{name} holds {len(values)} values; allowed are {count} or more"
        )
    return values[:count]
