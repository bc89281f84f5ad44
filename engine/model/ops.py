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
    """Bricks of one device. x is the residual stream (T, D) float32.

    Every brick heeds the fields of the layer's configs (engine.model.config says what each means); a device that lacks
    one of them refuses the model when it is opened. A norm that is None in the weights is left out.
    """

    def begin(self, batch: Batch) -> None:
        """Prepare a step: make room in the cache and look up everything that depends on positions alone.

        Raises:
            ContextFullError: a span would grow beyond the context; nothing was changed.
        """

    def embed(self, batch: Batch) -> Array:
        """x (T, D): embedding_scale · token_embd[token], plus position_embd[position], then embedding_norm."""

    def attn_qkv(self, layer: LayerWeights, x: Array) -> Array:
        """attn_norm, q/k/v projections, bias, clamp, q/k norm, RoPE; appends k and v to the cache; gives q (T, H, Hd).

        Latent attention makes q, k and v as LatentConfig says.
        """

    def attention(self, layer: LayerWeights, q: Array) -> Array:
        """Causal attention of every span over its own cache: (T, H·Hv)."""

    def attn_output(self, layer: LayerWeights, a: Array, x: Array) -> Array:
        """x + residual_scale · attn_post_norm(output · a), after v_b where latent attention is absorbed.

        The storage of x may be reused in sequential layers only: a parallel one reads x again.
        """

    def ffn_gate_up(self, layer: LayerWeights, x: Array) -> Array:
        """ffn_norm, then activation(gate) · up, divided by act_scales: h (T, F)."""

    def ffn_down(self, layer: LayerWeights, h: Array, x: Array) -> Array:
        """x + residual_scale · ffn_post_norm(down · h); may reuse the storage of x."""

    def ffn_moe(self, layer: LayerWeights, x: Array, y: Array) -> Array:
        """y + residual_scale · ffn_post_norm(the experts' sum for ffn_norm(x)); y is x in sequential layers."""

    def head(self, x: Array, batch: Batch) -> Array:
        """Logits (R, V) float32 of the output rows: softcap(logit_scale · (output · output_norm(x) + bias))."""
