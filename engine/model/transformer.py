"""The forward pass, written once for every device and architecture."""

from __future__ import annotations

from engine.model.batch import Batch
from engine.model.ops import Array, Ops
from engine.model.weights import ModelWeights


def hidden_states(weights: ModelWeights, ops: Ops, batch: Batch) -> Array:
    """Run all layers over a batch, extending the caches of its slots; returns the residual stream (T, D)."""
    ops.begin(batch)
    x = ops.embed(batch)
    for layer in weights.layers:
        q = ops.attn_qkv(layer, x)
        a = ops.attention(layer, q)
        y = ops.attn_output(layer, a, x)
        if not layer.parallel:
            x = y
        if layer.moe is not None:
            x = ops.ffn_moe(layer, x, y)
        else:
            h = ops.ffn_gate_up(layer, x)
            x = ops.ffn_down(layer, h, y)
    return x


def forward(weights: ModelWeights, ops: Ops, batch: Batch) -> Array:
    """Logits (R, V) of the batch's output rows."""
    return ops.head(hidden_states(weights, ops, batch), batch)
