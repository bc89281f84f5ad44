"""Residual connections on the CPU: what a part of a layer reads of x (T, S · D), and how its result changes x.

Plain numpy. One class per class of engine/model/config/skips.py, which gives the formulas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.cpu import reference
from engine.cpu.reference import Float32Array
from engine.model.config import BankedSkip, GatedSkip, HyperSkip, MixedSkip, NormedSkip, SkipConfig, StackSkip
from engine.model.weights import (
    BankedSkipWeights,
    GatedSkipWeights,
    HyperSkipWeights,
    Linear,
    MeanSkipWeights,
    MixedSkipWeights,
    NormedSkipWeights,
    SkipWeights,
    StackSkipWeights,
)

Project = Callable[[Linear, Float32Array], Float32Array]
"""A projection of (T, M), in an array of the caller's own."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What a part reads, h (T, D), and what write() needs to know of it."""

    h: Float32Array
    kept: Any = None


class Skips(ABC):
    """The residual connections of one model."""

    def begin(self, head: SkipWeights | None, embedded: Float32Array) -> Float32Array:
        """The streams (T, S · D) of token vectors (T, D); `head` are the weights of the head's connection."""
        return embedded

    @abstractmethod
    def read(self, weights: SkipWeights, x: Float32Array) -> Reading:
        """What a part, or the head, reads of x."""

    @abstractmethod
    def write(self, weights: SkipWeights, x: Float32Array, reading: Reading, part: Float32Array) -> Float32Array:
        """x after a part gave `part` (T, D) for what it read; may overwrite `part`, not x."""


class _NormedSkip(Skips):
    def __init__(self, config: NormedSkip) -> None:
        self._scale = np.float32(config.scale)

    def read(self, weights: SkipWeights, x: Float32Array) -> Reading:
        assert isinstance(weights, NormedSkipWeights)
        return Reading(reference.normalize(x, weights.norm))

    def write(self, weights: SkipWeights, x: Float32Array, reading: Reading, part: Float32Array) -> Float32Array:
        part += self._scale * reading.h
        return part


class _BankedSkip(Skips):
    """x is the running sum, then the banked states, the oldest first."""

    def __init__(self, width: int) -> None:
        self._width = width

    def read(self, weights: SkipWeights, x: Float32Array) -> Reading:
        assert isinstance(weights, BankedSkipWeights)
        states = x.reshape(len(x), -1, self._width)
        if states.shape[1] == 1:
            return Reading(x)
        scores = np.add.reduce(reference.normalize(states, weights.score), axis=-1)
        reference.softmax(scores)
        return Reading(np.add.reduce(states * scores[..., None], axis=1))

    def write(self, weights: SkipWeights, x: Float32Array, reading: Reading, part: Float32Array) -> Float32Array:
        assert isinstance(weights, BankedSkipWeights)
        total, banked = x[:, : self._width], x[:, self._width :]
        if weights.banks:
            return np.concatenate((part, banked, total), axis=1)
        return np.concatenate((part + total, banked), axis=1)


class _HyperSkip(Skips):
    def __init__(self, config: HyperSkip, linear: Project) -> None:
        self._count = config.count
        self._linear = linear

    def begin(self, head: SkipWeights | None, embedded: Float32Array) -> Float32Array:
        return np.tile(embedded, (1, self._count))

    def read(self, weights: SkipWeights, x: Float32Array) -> Reading:
        assert isinstance(weights, HyperSkipWeights)
        share = np.float32(1.0 / self._count)
        normed = reference.normalize(self._apart(x), weights.norm)
        beside = normed.reshape(x.shape)
        low = self._linear(weights.down, beside) * share
        low *= reference.sigmoid(low)
        gates = self._apart(reference.sigmoid(self._linear(weights.up, low)))
        h = np.add.reduce(normed * gates, axis=1) * share
        if weights.inject is None:
            return Reading(h)
        return Reading(h, np.float32(2.0) * reference.sigmoid(self._linear(weights.inject, beside) * share))

    def write(self, weights: SkipWeights, x: Float32Array, reading: Reading, part: Float32Array) -> Float32Array:
        changed: Float32Array = self._apart(x) + reading.kept[..., None] * part[:, None]
        return changed.reshape(x.shape)

    def _apart(self, x: Float32Array) -> Float32Array:
        """(T, S, D)."""
        return x.reshape(len(x), self._count, -1)


class _GatedSkip(Skips):
    def __init__(self, config: GatedSkip, linear: Project) -> None:
        self._config = config
        self._linear = linear

    def begin(self, head: SkipWeights | None, embedded: Float32Array) -> Float32Array:
        return np.tile(embedded, (1, self._config.count))

    def read(self, weights: SkipWeights, x: Float32Array) -> Reading:
        assert isinstance(weights, GatedSkipWeights)
        count, epsilon = self._config.count, np.float32(self._config.epsilon)
        mixed = self._linear(weights.fn, reference.normalize(x, weights.norm))
        gates = reference.sigmoid(mixed * weights.factor + weights.base)
        h = np.add.reduce(x.reshape(len(x), count, -1) * (gates[:, :count, None] + epsilon), axis=1)
        return Reading(h, gates[:, count:] * np.float32(self._config.magnitude) + epsilon)

    def write(self, weights: SkipWeights, x: Float32Array, reading: Reading, part: Float32Array) -> Float32Array:
        changed: Float32Array = x.reshape(len(x), self._config.count, -1) + reading.kept[..., None] * part[:, None]
        return changed.reshape(x.shape)


class _MixedSkip(Skips):
    def __init__(self, config: MixedSkip, linear: Project) -> None:
        self._config = config
        self._linear = linear

    def begin(self, head: SkipWeights | None, embedded: Float32Array) -> Float32Array:
        return np.tile(embedded, (1, self._config.count))

    def read(self, weights: SkipWeights, x: Float32Array) -> Reading:
        count, epsilon = self._config.count, np.float32(self._config.epsilon)
        streams = x.reshape(len(x), count, -1)
        if isinstance(weights, MeanSkipWeights):
            return Reading(np.add.reduce(streams, axis=1) / np.float32(count))
        assert isinstance(weights, MixedSkipWeights | GatedSkipWeights)
        mixed = self._linear(weights.fn, reference.normalize(x, weights.norm)) * weights.factor + weights.base
        gates = reference.sigmoid(mixed[:, : 2 * count])
        h = np.add.reduce(streams * (gates[:, :count, None] + epsilon), axis=1)
        if isinstance(weights, GatedSkipWeights):  # the head
            return Reading(h)
        return Reading(h, (gates[:, count:] * np.float32(2.0), self._balance(mixed[:, 2 * count :])))

    def write(self, weights: SkipWeights, x: Float32Array, reading: Reading, part: Float32Array) -> Float32Array:
        gates, matrix = reading.kept
        streams = x.reshape(len(x), self._config.count, -1)
        changed: Float32Array = gates[..., None] * part[:, None]
        for source in range(self._config.count):
            changed += matrix[:, source, :, None] * streams[:, source, None]
        return changed.reshape(x.shape)

    def _balance(self, logits: Float32Array) -> Float32Array:
        """C (T, S, S), from the stream of the first index to that of the second."""
        count, epsilon = self._config.count, np.float32(self._config.epsilon)
        matrix = logits.reshape(-1, count, count).copy()
        reference.softmax(matrix)
        matrix += epsilon
        for iteration in range(self._config.iterations):
            if iteration:
                matrix /= np.add.reduce(matrix, axis=2, keepdims=True) + epsilon
            matrix /= np.add.reduce(matrix, axis=1, keepdims=True) + epsilon
        return matrix


class _StackSkip(Skips):
    """x is a, b and r."""

    def begin(self, head: SkipWeights | None, embedded: Float32Array) -> Float32Array:
        assert isinstance(head, StackSkipWeights)
        assert head.init is not None
        return np.concatenate((embedded, np.broadcast_to(head.init, embedded.shape), embedded), axis=1)

    def read(self, weights: SkipWeights, x: Float32Array) -> Reading:
        assert isinstance(weights, StackSkipWeights)
        a, b, r = np.split(x, 3, axis=1)
        if weights.init is not None:  # the head
            return Reading(np.ascontiguousarray(a))
        return Reading(a + b if weights.begins else np.ascontiguousarray(r))

    def write(self, weights: SkipWeights, x: Float32Array, reading: Reading, part: Float32Array) -> Float32Array:
        assert isinstance(weights, StackSkipWeights)
        a, b, _ = np.split(x, 3, axis=1)
        part += reading.h
        if not weights.ends:
            return np.concatenate((a, b, part), axis=1)
        made = reference.normalize(part, weights.norm)
        return np.concatenate((made, b, made) if weights.high else (a, made, made), axis=1)


def make_skips(config: SkipConfig | None, width: int, linear: Project) -> Skips | None:
    """The residual connections of a model of this width D; None where they are plain sums."""
    if isinstance(config, NormedSkip):
        return _NormedSkip(config)
    if isinstance(config, BankedSkip):
        return _BankedSkip(width)
    if isinstance(config, GatedSkip):
        return _GatedSkip(config, linear)
    if isinstance(config, MixedSkip):
        return _MixedSkip(config, linear)
    if isinstance(config, StackSkip):
        return _StackSkip()
    return None if config is None else _HyperSkip(config, linear)
