"""The forward pass, written once for every device and architecture."""

from __future__ import annotations

from engine.model.batch import Batch
from engine.model.ops import Array, BatchT, HiddenOps, Layers, LayerT, Ops


def hidden_states(weights: Layers[LayerT], ops: HiddenOps[LayerT, BatchT], batch: BatchT) -> Array:
    """Run all layers over a batch, extending the caches of its slots; returns the residual stream (T, D)."""
    ops.begin(batch)
    return begun_states(weights, ops, batch)


def begun_states(weights: Layers[LayerT], ops: HiddenOps[LayerT, BatchT], batch: BatchT) -> Array:
    """hidden_states() of a batch that ops.begin() was given: on a GPU nothing but launches."""
    x = ops.embed(batch)
    for layer in weights.layers:
        y = ops.mix(layer, x)
        x = ops.feed_forward(layer, x if layer.parallel else y, y)
    return x


def forward(weights: Layers[LayerT], ops: Ops[LayerT], batch: Batch) -> Array:
    """Logits (R, V) of the batch's output rows."""
    return ops.head(hidden_states(weights, ops, batch), batch)
