"""What the bricks of a forward pass on the GPU share: the rows of a step, their buffers, products and norms.

Must not know of mixers, mixtures or streams.
"""

from __future__ import annotations

from typing import Protocol

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.launch_plan.steps import Step
from engine.cuda.load.buffers import Activations
from engine.cuda.load.device_products import DeviceProjection
from engine.cuda.load.device_weights import DeviceFfn, DeviceLayer, DeviceWeights
from engine.cuda.rows import parts
from engine.cuda.rows import rows as row_ops
from engine.cuda.rows.parts import DeviceNorm
from engine.cuda.step.folding import Hidden, columns_of
from engine.model.ops import LayerBricks


class Products(Protocol):
    """Products of the rows of one phase."""

    def product(
        self,
        projection: DeviceProjection,
        x: Hidden,
        out: DeviceArray,
        *,
        norm: DeviceNorm | None = None,
        add: bool = False,
        ready: bool = False,
        then: DeviceNorm | None = None,
    ) -> None:
        """out = or += projection of norm(x).

        Args:
            projection: the matrices.
            x: float32 (T, K), rows contiguous.
            out: float32 (T, >= projection.width), row stride free.
            norm: what is applied to x, for norms that fold.
            add: add to out.
            ready: an earlier product has left the operand of norm(x).
            then: leave the operand of products of then(out).
        """

    def gated(
        self,
        ffn: DeviceFfn,
        x: DeviceArray,
        *,
        norm: DeviceNorm | None = None,
        ready: bool = False,
        leaves: bool = False,
    ) -> Hidden:
        """activation(gate(norm(x))) * up(norm(x)) of a paired matrix: (T, F), as the down projection reads it.

        leaves: leave the operand of the down projection; only where norm(x) is ready.
        """


class RowBricks(LayerBricks[DeviceLayer]):
    """The rows of a step.

    Args:
        weights: the model.
        buffers: activations with room for every row of a batch.
        products: multiplies the rows.
        step: of the launch plan: phase and number of rows.
    """

    _positions: DeviceArray
    _tokens: DeviceArray

    def __init__(self, weights: DeviceWeights, buffers: Activations, products: Products, step: Step) -> None:
        self.weights = weights
        self.buffers = buffers
        self.step = step
        self._products = products
        self._product = products.product

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return self.step.n_rows

    def _gate_up(
        self, ffn: DeviceFfn, x: DeviceArray, norm: DeviceNorm | None, *, ready: bool = False, leaves: bool = False
    ) -> Hidden:
        if ffn.paired is not None:
            return self._products.gated(ffn, x, norm=norm, ready=ready, leaves=leaves)
        n, width, activation = int(x.shape[0]), ffn.plan.width, ffn.plan.activation
        h, up = columns_of(self.buffers.gate, n, width), columns_of(self.buffers.up, n, width)
        assert ffn.up is not None
        if ffn.gate is None:
            self._product(ffn.up, x, h, norm=norm)
            row_ops.gate(h, None, activation, ffn.plan.limits)
        else:
            self._product(ffn.gate, x, h, norm=norm)
            self._product(ffn.up, x, up, norm=norm)
            if ffn.plan.sparsity:
                parts.thin_out(h, ffn.plan.sparsity)
            row_ops.gate(h, up, activation, ffn.plan.limits)
        if ffn.act_scales is not None:
            parts.divide(h, ffn.act_scales)
        if ffn.sub_norm is not None:
            parts.normalize(h, h, ffn.sub_norm)
        return h

    def _add(
        self,
        layer: DeviceLayer,
        projection: DeviceProjection,
        x: Hidden,
        post: DeviceNorm | None,
        out: DeviceArray,
        *,
        then: DeviceNorm | None,
    ) -> None:
        """out += residual_scale * post(projection of x). then: see Products.product."""
        if post is None:
            self._product(projection, x, out, add=True, then=then)
            return
        part = self.buffers.part[: self.n_rows]
        self._product(projection, x, part)
        parts.normalize(part, out, post, scale=layer.residual_scale, add=True)

    @staticmethod
    def _joined(layer: DeviceLayer, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        """x, in parallel layers with what attention adds."""
        if layer.parallel:
            row_ops.add_scaled(x, y, None, 0)
        return x

    def _normed(self, x: DeviceArray, norm: DeviceNorm | None) -> tuple[DeviceArray, DeviceNorm | None]:
        """What a product of norm(x) reads, and what it applies itself."""
        if norm is None or norm.folds:
            return x, norm
        out = self.buffers.normed[: x.shape[0]]
        parts.normalize(x, out, norm)
        return out, None
