"""The seam between a model and a device: the bricks a forward pass is made of.

A backend implements `Ops`; the transformer calls it and never looks into the arrays that it gets back. Names of
bricks are the names in profiles, parity reports and kernel files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from engine.model.batch import Batch

Array = Any  # opaque to the model: numpy on the CPU, a device buffer elsewhere


class Layer(Protocol):
    """What the forward pass and the compositions below read of a layer's weights, on any device."""

    @property
    def parallel(self) -> bool:
        """Whether the feed-forward part reads the layer's input."""

    @property
    def ffn(self) -> object | None:
        """The gated or plain feed-forward part, if the layer has one."""

    @property
    def moe(self) -> object | None:
        """The mixture of experts, if the layer has one."""


LayerT = TypeVar("LayerT", bound=Layer)
LayerIn = TypeVar("LayerIn", bound=Layer, contravariant=True)
LayerOut = TypeVar("LayerOut", bound=Layer, covariant=True)
BatchT = TypeVar("BatchT")
BatchIn = TypeVar("BatchIn", contravariant=True)


class Layers(Protocol[LayerOut]):
    """A model's layers in order, as one device keeps them."""

    @property
    def layers(self) -> Sequence[LayerOut]:
        """All layers."""


class HiddenOps(Protocol[LayerIn, BatchIn]):
    """Bricks of one device up to the residual stream x (T, D) float32.

    BatchIn is what describes the rows to the device: a Batch, or None where tokens and positions are there already.

    Every brick applies the fields of the layer's configs (engine.model.config says what each means); a device that
    lacks one of them refuses the model when it is opened. A norm that is None in the weights is left out.
    """

    def begin(self, batch: BatchIn) -> None:
        """Prepare a step: make room in the cache and look up everything that depends on positions alone.

        Raises:
            ContextFullError: a span would grow beyond the context; nothing was changed.
        """

    def embed(self, batch: BatchIn) -> Array:
        """x (T, D): embedding_scale · token_embd[token], plus position_embd[position], then embedding_norm.

        Also what ModelConfig says that layers read of a token beside x. With several streams x is (T, streams, D).
        """

    def mix(self, layer: LayerIn, x: Array) -> Array:
        """y = x + residual_scale · attn_post_norm(mixer(attn_norm(x))): the part that reads other tokens.

        Extends the cache of every span. The storage of x may be reused in sequential layers only: a parallel layer's
        feed-forward part reads x again.
        """

    def feed_forward(self, layer: LayerIn, x: Array, y: Array) -> Array:
        """y + residual_scale · ffn_post_norm(ffn(ffn_norm(x))); x is y in sequential layers. y itself without a part.

        Then what LayerConfig says that a layer does beside its parts. May reuse the storage of x and y.
        """


class Ops(HiddenOps[LayerIn, Batch], Protocol[LayerIn]):
    """All bricks of one device."""

    def head(self, x: Array, batch: Batch) -> Array:
        """Logits (R, V) float32 of the output rows: softcap(logit_scale · (output · output_norm(x) + bias))."""


class LayerBricks(Protocol[LayerIn]):
    """Ops.mix and Ops.feed_forward composed of smaller bricks; a device derives its ops from it and supplies those."""

    def mix(self, layer: LayerIn, x: Array) -> Array:
        """See Ops.mix: attention."""
        q = self.attn_qkv(layer, x)
        a = self.attention(layer, q)
        return self.attn_output(layer, a, x)

    def feed_forward(self, layer: LayerIn, x: Array, y: Array) -> Array:
        """See Ops.feed_forward: a mixture of experts, or a gated or plain part."""
        if layer.moe is not None:
            return self.ffn_moe(layer, x, y)
        if layer.ffn is None:
            return y
        h = self.ffn_gate_up(layer, x)
        return self.ffn_down(layer, h, y)

    def attn_qkv(self, layer: LayerIn, x: Array) -> Array:
        """attn_norm, q/k/v projections, bias, clamp, q/k norm, RoPE; appends k and v to the cache; gives q (T, H, Hd).

        Latent attention makes q, k and v as LatentConfig says.
        """

    def attention(self, layer: LayerIn, q: Array) -> Array:
        """Causal attention of every span over its own cache: (T, H·Hv)."""

    def attn_output(self, layer: LayerIn, a: Array, x: Array) -> Array:
        """x + residual_scale · attn_post_norm(output · a), after v_b where latent attention is absorbed.

        The storage of x may be reused as Ops.mix says.
        """

    def ffn_gate_up(self, layer: LayerIn, x: Array) -> Array:
        """ffn_norm, then activation(gate) · up, divided by act_scales: h (T, F)."""

    def ffn_down(self, layer: LayerIn, h: Array, y: Array) -> Array:
        """y + residual_scale · ffn_post_norm(down · h); may reuse the storage of y."""

    def ffn_moe(self, layer: LayerIn, x: Array, y: Array) -> Array:
        """y + residual_scale · ffn_post_norm(the experts' sum for ffn_norm(x)); y is x in sequential layers."""
