"""Which product of a decode step leaves its result as the operand of the next one (batch_matvec.py).

What adds to the residual stream can make the operand of norm(stream) on the way, where nothing stands between the two.
Must not know of launches.
"""

from __future__ import annotations

from engine.cuda.load.weights import DeviceLayer, DeviceWeights
from engine.cuda.matrix.linear import Projection
from engine.cuda.rows.parts import DeviceNorm


def _emits(projection: Projection, norm: DeviceNorm | None) -> DeviceNorm | None:
    alone = len(projection.parts) == 1 and projection.parts[0].matvec.emits
    return norm if alone and norm is not None and norm.folds else None


def norm_behind_attention(layer: DeviceLayer) -> DeviceNorm | None:
    """The norm of gate and up, if the output projection of attention can leave their operand."""
    if layer.parallel or layer.attn_post_norm is not None or layer.ffn is None or layer.ffn.paired is None:
        return None
    return _emits(layer.output, layer.ffn_norm)


def norm_behind(weights: DeviceWeights, index: int) -> DeviceNorm | None:
    """The norm of what reads the stream behind layer `index`, if its down projection can leave that operand."""
    layer, layers = weights.layers[index], weights.layers
    if layer.parallel or layer.ffn_post_norm is not None or layer.ffn is None:
        return None
    return _emits(layer.ffn.down, layers[index + 1].attn_norm if index + 1 < len(layers) else weights.output_norm)
