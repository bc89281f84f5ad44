"""Sliding windows of a model's layers, from metadata."""

from __future__ import annotations

from engine.errors import ModelFileError
from engine.model.parts import WindowParts
from engine.model.reading.source import Source

PATTERN = "attention.sliding_window_pattern"


def read_windows(source: Source, parts: WindowParts | None) -> list[int | None]:
    """The window of each layer (WindowParts.chunks: its chunks' size); None = it sees all positions.

    Raises:
        ModelFileError: the list of windowed layers is shorter than the model.
    """
    read, n_layers = source.read, source.n_layers
    nothing: list[int | None] = [None] * n_layers
    if parts is None:
        return nothing
    # 0 in the file means none.
    window = read.integer("attention.sliding_window", parts.default or 0, low=0) or None
    if window is None or (parts.n_layers is not None and parts.n_layers != n_layers):
        return nothing
    if read.is_list(PATTERN):
        pattern = read.flags(PATTERN)
        if len(pattern) < n_layers:
            raise ModelFileError(
                f"metadata key {source.name}.{PATTERN} holds {len(pattern)} values; "
                f"allowed are {n_layers}, one per layer"
            )
        return [window if pattern[index] else None for index in range(n_layers)]
    period = read.integer(PATTERN, parts.period, low=0)
    full = 0 if parts.full_first else period - 1
    return [window if period == 0 or index % period != full else None for index in range(n_layers)]
