"""What a layer adds to its input for the last few tokens (NgramConfig). Letters: T rows. Must not know of requests."""

from __future__ import annotations

import numpy as np

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.formats.dequant import embed
from engine.cuda.load.device_recurrent import DeviceNgrams
from engine.cuda.recurrent.ngrams.ngrams import Ngrams
from engine.cuda.step.folding import columns_of
from engine.cuda.step.moves import Moves


def add_ngrams(layer: DeviceNgrams, tokens: DeviceArray, x: DeviceArray, moves: Moves) -> None:
    """Changes x (T, C) in place.

    The rows of the table are chosen on the device: the token of a decode step was drawn there, and is no earlier known
    to the host. The tokens before it are a recurrent state, so what holds for states holds for them.
    """
    plan, buffers, n = layer.plan, moves.buffers, len(x)
    kernels, (past, known) = moves.states.kernels[plan.shape], moves.states.arrays(plan.cache)
    assert isinstance(kernels, Ngrams)
    chosen = columns_of(buffers.convolved, n, plan.shape.rows).view(np.int32)
    kernels.choose(moves.rows, tokens, layer.kept, known, chosen)
    read = columns_of(buffers.scanned, n, plan.key_value.columns)
    embed(layer.table, chosen.reshape(-1), read.reshape(n * plan.shape.rows, plan.table.columns))
    products = columns_of(buffers.between, n, plan.key_value.width)
    moves.product(layer.key_value, read, products)
    inputs = columns_of(buffers.mixed, n, plan.shape.channels)
    kernels.gate(products, layer.kept, x, inputs)
    kernels.convolve(moves.rows, inputs, layer.kept, past, x)
    kernels.keep(moves.rows, tokens, inputs, past, known)
