"""Tables of positions: rotation angles and linear biases, each made once for all layers that share it."""

from __future__ import annotations

import numpy as np

from engine.errors import ModelFileError
from engine.model.building.source import TensorSource
from engine.model.config import AttentionConfig, RopeConfig
from engine.model.rope import Float32Array, RopeTable, alibi_slopes, build_rope


class PositionTables:
    """The tables of one model."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._ropes: dict[RopeConfig, RopeTable] = {}
        self._slopes: dict[tuple[int, float], Float32Array] = {}

    def rope(self, rope: RopeConfig | None) -> RopeTable | None:
        """Angles of a rotation, or None for none.

        Raises:
            ModelFileError: the file's divisors of frequencies are zero or not finite.
        """
        if rope is None:
            return None
        if rope not in self._ropes:
            self._ropes[rope] = build_rope(rope, self._frequency_divisors(rope))
        return self._ropes[rope]

    def alibi_slopes(self, attention: AttentionConfig) -> Float32Array | None:
        """Slopes (H,) of linear biases, or None for none."""
        if not attention.alibi:
            return None
        key = (attention.n_heads, attention.alibi)
        if key not in self._slopes:
            self._slopes[key] = alibi_slopes(*key)
        return self._slopes[key]

    def _first_divisors(self, name: str, shape: tuple[int, ...]) -> Float32Array | None:
        """The first of more divisors, which the file has for layers that rotate more."""
        tensors = self._source.tensors
        if not tensors.has(name):
            return None
        stored = tensors.shape(name)
        return tensors.vector(name, stored if stored > shape else shape).reshape(-1)[: shape[0]]

    def _frequency_divisors(self, rope: RopeConfig) -> Float32Array | None:
        tensors, parts, shape = self._source.tensors, self._source.architecture.rope, (rope.n_rot // 2,)
        name, divisors = "rope_freqs.weight", None
        assert parts is not None
        if parts.divisors and rope.divided:
            divisors = self._first_divisors(name, shape) if parts.halved else tensors.optional_vector(name, shape)
        if parts.long_factors:
            both = {which: f"rope_factors_{which}.weight" for which in ("long", "short")}
            if any(tensors.has(other) for other in both.values()):
                name = both["long" if rope.long_factors else "short"]
                divisors = tensors.vector(name, shape)
                tensors.ignore(both.values())
        if divisors is not None and not (np.isfinite(divisors).all() and (divisors != 0).all()):
            raise ModelFileError(
                f"tensor {name} holds zeros or numbers that are not finite; allowed are finite divisors: "
                "the file is damaged"
            )
        return divisors
