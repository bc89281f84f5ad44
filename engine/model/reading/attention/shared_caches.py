"""Which layers of a model read the keys and values of an earlier layer, from metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.errors import ModelFileError
from engine.model.config import AttentionConfig
from engine.model.parts import AttentionParts
from engine.model.reading.source import Source

KEY = "attention.shared_kv_layers"


def share_caches(
    source: Source, parts: AttentionParts, layers: Sequence[AttentionConfig | None]
) -> list[AttentionConfig | None]:
    """The layers' attention, where each layer that shares a cache names its owner.

    The owner is the last layer with a cache of its own that has a window where the other has one, and none where it has
    none.

    Raises:
        ModelFileError: no such layer exists, or its heads have other sizes.
    """
    own = source.n_layers if parts.own_caches is None else min(parts.own_caches, source.n_layers)
    own = source.n_layers - source.read.integer(KEY, source.n_layers - own, low=0, high=source.n_layers)
    return [
        layer if layer is None or index < own else replace(layer, cache_layer=_owner(source, layers[:own], layer))
        for index, layer in enumerate(layers)
    ]


def _owner(source: Source, owners: Sequence[AttentionConfig | None], layer: AttentionConfig) -> int:
    windowed = layer.window is not None
    alike = [i for i, owner in enumerate(owners) if owner is not None and (owner.window is not None) == windowed]
    sizes = layer.n_kv_heads, layer.key_width, layer.value_width
    if alike:
        owner = owners[alike[-1]]
        assert owner is not None
        if (owner.n_kv_heads, owner.key_width, owner.value_width) == sizes:
            return alike[-1]
    raise ModelFileError(
        f"metadata key {source.name}.{KEY} leaves {len(owners)} layers with a cache of their own; allowed is a number "
        f"after which one of them {'has a window' if windowed else 'has no window'} and {sizes[0]} key/value heads of "
        f"{sizes[1]} and {sizes[2]} columns"
    )
