"""What every recurrent mixer needs from the forward pass: products, norms, and the states of a step's sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engine.cpu.caches.model import KVCache
from engine.cpu.reference import Float32Array as Float32Array
from engine.cpu.reference import sigmoid
from engine.model.batch import Span
from engine.model.weights import Linear, Norm

Moved = tuple[Float32Array, Float32Array]
"""What a recurrence gives for its tokens, and the state behind them."""

SOFTPLUS_LIMIT = 20.0
"""Beyond it softplus(x) is x in float32."""


@dataclass(frozen=True)
class Heads:
    """How the rows of a delta rule's convolution are divided: q and k of the key heads, then v of the value heads.

    Attributes:
        key_heads: number of heads of q, and of k.
        grouped: value head h reads key head h / (H / key_heads), else h mod key_heads.
        epsilon: of the lengths of q and k.
    """

    key_heads: int
    grouped: bool
    epsilon: float


class RecurrentKernels(Protocol):
    """Compiled forms of what the mixers compute between their products; each gives None where its sizes do not fit."""

    def convolve(
        self, x: Float32Array, weight: Float32Array, bias: Float32Array | None, past: Float32Array, *, silu: bool
    ) -> Moved | None:
        """convolution.short_convolution, without dilation, and silu of it where wanted."""

    def delta_rule(
        self, convolved: Float32Array, heads: Heads, decay: Float32Array, beta: Float32Array, state: Float32Array
    ) -> Moved | None:
        """delta_net.delta_heads."""

    def gate(self, z: Float32Array, y: Float32Array) -> Float32Array | None:
        """silu(z) · y, perhaps written over z."""


@dataclass(frozen=True)
class Tools:
    """One layer in one step.

    Attributes:
        linear: a projection of (T, M), in an array of the caller's own.
        normalize: a norm over the last axis; None leaves the array as it is.
        cache: the states.
        layer: number of the layer.
        all_spans: the step's sequences.
        shared: what layers of one step leave for later ones, by name.
        kernels: compiled forms; None computes everything in numpy.
    """

    linear: Callable[[Linear, Float32Array], Float32Array]
    normalize: Callable[[Float32Array, Norm | None], Float32Array]
    cache: KVCache
    layer: int
    all_spans: Sequence[Span]
    shared: dict[str, Float32Array] = field(default_factory=dict)
    kernels: RecurrentKernels | None = None

    def spans(self) -> Iterator[tuple[Span, slice]]:
        """The sequences with their rows of the step."""
        for span in self.all_spans:
            yield span, slice(span.row, span.row + span.n_rows)

    def state(self, span: Span) -> tuple[Float32Array, ...]:
        """The state before a sequence's first token of the step, read-only; zeros at its beginning."""
        return self.cache.state(self.layer, span)

    def store(self, span: Span, state: Sequence[Float32Array | None]) -> None:
        """Write the state after a sequence's last token of the step; None leaves an array to the layer's other part."""
        self.cache.store_state(self.layer, span, state)

    def gated(self, y: Float32Array, z: Float32Array) -> Float32Array:
        """y · silu(z), perhaps written over either."""
        out = None if self.kernels is None else self.kernels.gate(z, y)
        if out is None:
            y *= z * sigmoid(z)
            out = y
        return out


def softplus(x: Float32Array) -> Float32Array:
    """log(1 + exp(x))."""
    y: Float32Array = np.where(x > SOFTPLUS_LIMIT, x, np.log1p(np.exp(np.minimum(x, np.float32(SOFTPLUS_LIMIT)))))
    return y
