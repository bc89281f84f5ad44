"""The seam between a model and a device: the bricks a forward pass is made of.

A backend implements `Ops`; the transformer calls it and never looks inside the arrays it is handed back. Names of
bricks are the names in profiles, parity reports and kernel files.
"""

from __future__ import annotations

from typing import Any, Protocol

from engine.model.batch import Batch
from engine.model.weights import LayerWeights

Array = Any  # opaque to the model: numpy on the CPU, a device buffer elsewhere

BRICKS = ("embed", "attn_qkv", "attention", "attn_output", "ffn_gate_up", "ffn_down", "ffn_moe", "head")


class Ops(Protocol):
    """Bricks of one device. x is the residual stream (T, D) float32; a brick may reuse the storage of its x."""

    def begin(self, batch: Batch) -> None:
        """Prepare a step: make room in the cache and look up everything that depends on positions alone.

        Raises:
            ContextFullError: a span would grow beyond the context; nothing was changed.
        """

    def embed(self, batch: Batch) -> Array:
        """Rows of token_embd for the batch's tokens: x (T, D)."""

    def attn_qkv(self, layer: LayerWeights, x: Array) -> Array:
        """Norm, q/k/v projections, bias, optional q/k norm, RoPE; appends k and v to the cache; gives q (T, H, Hd)."""

    def attention(self, layer: LayerWeights, q: Array) -> Array:
        """Causal (optionally windowed) attention of every span over its own cache: (T, H·Hv)."""

    def attn_output(self, layer: LayerWeights, a: Array, x: Array) -> Array:
        """The output projection of a, plus x."""

    def ffn_gate_up(self, layer: LayerWeights, x: Array) -> Array:
        """Norm, then activation(gate) · up: h (T, F)."""

    def ffn_down(self, layer: LayerWeights, h: Array, x: Array) -> Array:
        """The down projection of h, plus x."""

    def ffn_moe(self, layer: LayerWeights, x: Array) -> Array:
        """Norm, routing and the weighted sum of the chosen (and shared) experts, plus x."""

    def head(self, x: Array, batch: Batch) -> Array:
        """Final norm and output projection of the batch's output rows: logits (R, V) float32."""
