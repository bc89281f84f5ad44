"""What some families do with the residual stream beside the parts of a layer, from metadata and names of tensors."""

from __future__ import annotations

from engine.errors import UnsupportedModelError
from engine.model.config import AltUpConfig
from engine.model.reading.source import Source

MOST_STREAMS = 64
WIDEST = 2**16
"""Most numbers of a layer's own vector of a token."""


def read_streams(source: Source) -> AltUpConfig | None:
    """The vectors of the residual stream; None where it is one."""
    default = source.architecture.layer.streams
    if default is None:
        return None
    count = source.read.integer("altup.num_inputs", default, low=2, high=MOST_STREAMS)
    return AltUpConfig(count, source.read.integer("altup.active_idx", 0, low=0, high=count - 1))


def read_per_layer_width(source: Source) -> int:
    """P of ModelConfig.per_layer_width."""
    default = source.architecture.embedding.per_layer
    return (
        0 if default is None else source.read.integer("embedding_length_per_layer_input", default, low=0, high=WIDEST)
    )


def read_laurel_rank(source: Source, index: int) -> int:
    """Rank of the projection beside the mixer of layer `index`, which only the tensor's shape says.

    Raises:
        UnsupportedModelError: the tensor is missing or is no matrix.
    """
    if not source.architecture.layer.laurel:
        return 0
    name = f"blk.{index}.laurel_l.weight"
    if name not in source.tensors or len(source.tensors[name].shape) != 2:
        raise UnsupportedModelError(f"tensor {name} is missing or has no two dimensions: take a complete file")
    return int(source.tensors[name].shape[0])


def has_output_scale(source: Source, index: int) -> bool:
    """Whether a learned number multiplies what layer `index` gives."""
    return source.architecture.layer.output_scale and f"blk.{index}.layer_output_scale.weight" in source.tensors


def read_output_factor(source: Source, index: int) -> float:
    """The constant that multiplies what layer `index` gives."""
    if not source.architecture.layer.rescaled:
        return 1.0
    period = source.read.integer("rescale_every_n_layers", 0, low=0)
    return 0.5 if period and (index + 1) % period == 0 else 1.0
