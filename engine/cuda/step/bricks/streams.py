"""What Gemma 3n and 4 have beside a layer's mixer and feed-forward part: several streams, and vectors for every layer.

Formulas: engine.model.config (LayerConfig, ModelConfig). Must not know of mixers, requests or sampling.
"""

from __future__ import annotations

import math

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.formats.dequant import embed
from engine.cuda.load.device_weights import (
    DeviceLaurel,
    DeviceLayer,
    DeviceLayerInput,
    DevicePerLayer,
    DeviceSpread,
)
from engine.cuda.rows import parts, streams
from engine.cuda.rows import rows as row_ops
from engine.cuda.rows.activation import KernelActivation
from engine.cuda.rows.parts import NO_ROPE
from engine.cuda.step.bricks.base import RowBricks
from engine.cuda.step.folding import columns_of


class StreamBricks(RowBricks):
    """Streams (T, A, D) and vectors (T, L, P) of the rows of a step."""

    def _spread(self, spread: DeviceSpread, x: DeviceArray) -> None:
        """Embeddings become streams."""
        n = self.n_rows
        parts.rotate(x[:, None], self._stream(0)[:, None], NO_ROPE, self._positions)
        part = self.buffers.part[:n]
        for place, proj in enumerate(spread.proj, 1):
            self._product(proj, x, part)
            streams.lengthen(part, x, self._stream(place))

    def _merge(self, spread: DeviceSpread, x: DeviceArray) -> None:
        """Streams become what the head reads."""
        part = self.buffers.part[: self.n_rows]
        parts.rotate(self._stream(0)[:, None], x[:, None], NO_ROPE, self._positions)
        for place, unembd in enumerate(spread.unembd_proj, 1):
            self._product(unembd, self._stream(place), part)
            streams.lengthen(part, self._stream(spread.active), x, add=True)
        parts.scale(x, 1.0 / (len(spread.unembd_proj) + 1))

    def _stream(self, place: int) -> DeviceArray:
        """One of several streams, (T, D)."""
        width = self.weights.plan.width
        return self.buffers.streams[: self.n_rows, place * width : (place + 1) * width]

    def _layer_inputs(self, per_layer: DevicePerLayer, tokens: DeviceArray, x: DeviceArray) -> None:
        """Every layer's own vectors of the rows; see ModelConfig.per_layer_width."""
        inputs, projected = self.buffers.layer_inputs[: self.n_rows], self.buffers.layer_projected[: self.n_rows]
        width = per_layer.plan.width
        half = math.sqrt(0.5)
        embed(per_layer.token_embd, tokens, inputs, scale=half * math.sqrt(width), pdl=False)
        self._product(per_layer.model_proj, x, projected)
        pieces = inputs.shape[1] // width
        parts.normalize(projected, inputs, per_layer.proj_norm, pieces=pieces, scale=half, add=True)

    def _add_laurel(self, laurel: DeviceLaurel, x: DeviceArray) -> None:
        """x becomes what LayerConfig.laurel_rank says; what the mixer read is in `normed`."""
        n, normed = self.n_rows, self.buffers.normed[: self.n_rows]
        low, part = columns_of(self.buffers.gate, n, laurel.left.width), self.buffers.part[:n]
        self._product(laurel.left, normed, low)
        self._product(laurel.right, low, part)
        parts.normalize(part, x, laurel.post_norm, add=True)
        row_ops.add_scaled(x, normed, None, 0)
        parts.scale(x, math.sqrt(0.5))

    def _add_layer_input(self, layer: DeviceLayer, weights: DeviceLayerInput, x: DeviceArray) -> None:
        """Adds to x, or to all streams but the first, what the rows' own vectors for the layer give."""
        n, width, index = self.n_rows, weights.inp_gate.width, layer.index
        h, own = columns_of(self.buffers.gate, n, width), columns_of(self.buffers.up, n, width)
        self._product(weights.inp_gate, x, h)
        vectors = self.buffers.layer_inputs[:n, None, index * width : (index + 1) * width]
        parts.rotate(vectors, own[:, None], NO_ROPE, self._positions)
        row_ops.gate(h, own, KernelActivation.GELU_TANH)
        part = self.buffers.part[:n]
        self._product(weights.proj, h, part)
        if layer.streams is None:
            parts.normalize(part, x, weights.post_norm, add=True)
            return
        parts.normalize(part, part, weights.post_norm)
        streams.add(self.buffers.streams[:n], part)
