"""What the readers of all parts share: the declaration, the file's keys and tensor names, and the model's sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.model.architecture import Architecture
from engine.model.reading.metadata import LIMIT, HyperParameters


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """One file seen through the declaration of its family.

    Attributes:
        architecture: the declaration.
        read: the family's metadata keys.
        tensors: the file's tensors by name; optional parts show in their names.
        width: D.
        context_length: trained.
        run_context: context length of the run.
        n_blocks: layers in the file, those that predict later tokens included.
        n_layers: layers that a token passes through.
    """

    architecture: Architecture
    read: HyperParameters
    tensors: Mapping[str, Any]
    width: int
    context_length: int
    run_context: int
    n_blocks: int
    n_layers: int

    @property
    def name(self) -> str:
        """The family's name, the prefix of its keys."""
        return self.architecture.name

    @property
    def prefix(self) -> str:
        """What the names of a layer's tensors begin with, before its number."""
        return self.architecture.layer.prefix

    def default(self, key: str, default: float | None) -> float | None:
        """A number that families with a default read; 0 in the file means none."""
        if default is None:
            return None
        return self.read.number(key, default, low=0.0, high=LIMIT) or None


def open_source(
    architecture: Architecture,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    run_context: Callable[[int], int],
) -> Source:
    """Read the sizes that all parts need.

    Raises:
        ModelFileError: one of them is missing, of the wrong type, or out of range.
    """
    read = HyperParameters(metadata, architecture.name)
    context_length = read.integer("context_length")
    n_blocks = read.integer("block_count", high=max(1, len(tensors)))
    predicting = 0
    if architecture.next_token_layers:
        predicting = read.integer("nextn_predict_layers", 0, low=0, high=n_blocks - 1)
    return Source(
        architecture=architecture,
        read=read,
        tensors=tensors,
        width=read.integer("embedding_length"),
        context_length=context_length,
        run_context=run_context(context_length),
        n_blocks=n_blocks,
        n_layers=n_blocks - predicting,
    )
