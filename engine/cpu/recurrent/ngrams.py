"""Tables of n-grams: what a layer adds to its input for the last few tokens (NgramConfig)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from engine.cpu.recurrent.convolution import short_convolution
from engine.cpu.recurrent.tools import Float32Array, Tools
from engine.cpu.reference import normalize, sigmoid
from engine.gguf.quants import dequantize
from engine.model.config import LEAST_GATE, NgramConfig
from engine.model.weights import NgramWeights

Rows = npt.NDArray[np.int64]


def table_rows(config: NgramConfig, tokens: Rows, past: Rows) -> Rows:
    """The rows (T, (N - 1) · G) of the table that tokens (T,) read.

    Args:
        config: the table.
        tokens: ids.
        past: (N - 1,) the ids before them, oldest first; -1 = none.
    """
    known = np.concatenate((past, tokens))
    mixed = tokens.astype(np.uint64) * np.uint64(config.multipliers[0])
    cut, rows = np.zeros(len(tokens), dtype=bool), []
    for back in range(1, config.length):
        first = config.length - 1 - back
        before = known[first : first + len(tokens)]
        cut |= (before < 0) | (before == config.end)
        read = np.where(cut, config.end, before).astype(np.uint64)
        mixed = mixed ^ (read * np.uint64(config.multipliers[back]))
        heads = slice((back - 1) * config.heads, back * config.heads)
        sizes, offsets = (np.array(part[heads], dtype=np.uint64) for part in (config.sizes, config.offsets))
        rows.append(mixed[:, None] % sizes + offsets)
    return np.concatenate(rows, axis=1).astype(np.int64)


def add_ngrams(
    config: NgramConfig, weights: NgramWeights, tokens: npt.NDArray[np.int32], x: Float32Array, tools: Tools
) -> Float32Array:
    """x (T, S · D) with what NgramConfig says of these tokens (T,) added. Stores the states behind the step."""
    n_rows, streams = len(x), (len(x), -1, weights.value.weight.rows)
    states = {span.slot: tools.state(span) for span, _ in tools.spans()}
    embedded = np.empty((n_rows, config.rows * config.width), dtype=np.float32)
    for span, rows in tools.spans():
        past = states[span.slot][1].astype(np.int64) - 1
        read = table_rows(config, tokens[rows].astype(np.int64), past)
        embedded[rows] = dequantize(weights.table.raw[read.reshape(-1)], weights.table.type).reshape(len(read), -1)
    key = normalize(tools.linear(weights.key, embedded).reshape(streams), weights.norm_key)
    scores = np.add.reduce(key * normalize(x.reshape(streams), weights.norm_query), axis=-1)
    scores *= np.float32(1.0 / math.sqrt(streams[2]))
    gates = sigmoid(np.sign(scores) * np.sqrt(np.maximum(np.abs(scores), np.float32(LEAST_GATE))))
    gated = tools.linear(weights.value, embedded)[:, None] * gates[..., None]
    inputs = normalize(gated, weights.norm_conv).reshape(x.shape)
    out = x + gated.reshape(x.shape)
    for span, rows in tools.spans():
        past_inputs, past_tokens = states[span.slot]
        convolved, past_inputs = short_convolution(inputs[rows], weights.conv1d, None, past_inputs, config.length)
        out[rows] += convolved * sigmoid(convolved)
        known = np.concatenate((past_tokens, tokens[rows].astype(np.float32) + np.float32(1.0)))
        tools.store(span, (past_inputs, known[len(known) - len(past_tokens) :]))
    return out
