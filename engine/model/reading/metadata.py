"""Typed, bounded reading of the hyper-parameters in a file's metadata. Nothing in a file is trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.errors import ModelFileError

LARGEST = 2**31 - 1

LIMIT = 1e6
"""Largest factor accepted; a file with a larger one is damaged."""

ALIASES: dict[str, tuple[str, ...]] = {
    "attention.key_length": ("attention.head_dim",),
    "attention.value_length": ("attention.head_dim",),
    "attention.temperature_scale": ("rope.scaling_beta",),
    "context_length": ("max_position_embeddings",),
    "expert_weights_norm": ("norm_top_k_prob",),
    "rope.dimension_sections": ("rope.mrope_section",),
    "rope.freq_base": ("rope.global.freq_base",),
    "rope.freq_base_swa": ("rope.local.freq_base",),
    "rope.scaling.yarn_beta_fast": ("rope.scaling.beta_fast",),
    "rope.scaling.yarn_beta_slow": ("rope.scaling.beta_slow",),
    "rope.scaling.yarn_ext_factor": ("rope.scaling.extrapolation_factor",),
    "rope.scaling.yarn_log_multiplier": ("rope.scaling.mscale_all_dim",),
}
"""Other names of keys, as Ollama's converters write them; the usual name goes first where a file has both."""


def usual_name(name: str) -> str:
    """The key that a name is an alias of, else the name itself."""
    return next((key for key, names in ALIASES.items() if name in names), name)


class HyperParameters:
    """Reader of PREFIX.key values; every method raises ModelFileError with the key, what was found, what is allowed.

    A key may be in the file under another of its names (ALIASES).
    """

    def __init__(self, metadata: Mapping[str, Any], prefix: str) -> None:
        self._metadata = metadata
        self._prefix = prefix
        self._read: set[str] = set()

    def under(self, prefix: str) -> HyperParameters:
        """A reader of the same file's keys with another prefix."""
        return HyperParameters(self._metadata, prefix)

    def unread(self) -> dict[str, Any]:
        """Keys (without the prefix) that were not asked for, with their values.

        An alias beside the usual name is among them where the two values differ.
        """
        start = len(self._prefix) + 1
        names = (name for name in self._metadata if name.startswith(f"{self._prefix}."))
        return {name[start:]: self._metadata[name] for name in names if not self._was_read(name[start:])}

    def has(self, key: str) -> bool:
        """Whether the file has the key, under any of its names."""
        return self._value(self.spelled(key)) is not None

    def spelled(self, key: str) -> str:
        """The name under which the file has a key; the usual one where it has none."""
        names = (key, *ALIASES.get(key, ()))
        return next((name for name in names if self._value(name) is not None), key)

    def _was_read(self, name: str) -> bool:
        """Whether a key of the file was asked for, or repeats what the file says under the usual name."""
        if name in self._read:
            return True
        usual = [other for key, names in ALIASES.items() if name in names and (other := self._value(key)) is not None]
        return bool(usual) and all(np.array_equal(self._value(name), other) for other in usual)

    def _value(self, name: str) -> Any:
        return self._metadata.get(f"{self._prefix}.{name}")

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = LARGEST) -> int:
        """An integer in [low, high]; `default` where the key is missing (None = the key is required)."""
        return self._integer(key, self._get(key, default), low, high)

    def number(
        self, key: str, default: float | None = None, *, low: float = -math.inf, high: float = math.inf
    ) -> float:
        """A finite number in [low, high]."""
        return self._number(key, self._get(key, default), low, high)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self._get(key, default)
        if not isinstance(value, (bool, np.bool_)):
            raise self._wrong(key, value, "true or false")
        return bool(value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def per_layer(
        self, key: str, n_layers: int, default: tuple[int, ...] | None = None, *, low: int = 1, high: int = LARGEST
    ) -> tuple[int, ...]:
        """One integer for each layer: an array of that length, or one number that holds for all."""
        if default is not None and not self.has(key):
            return default
        return tuple(self._integer(name, item, low, high) for name, item in self._each_layer(key, n_layers))

    def numbers_per_layer(
        self, key: str, n_layers: int, default: float | None, *, low: float = -math.inf, high: float = math.inf
    ) -> tuple[float, ...]:
        """One finite number for each layer, as in per_layer(); `default` for all where the key is missing."""
        if default is not None and not self.has(key):
            return (default,) * n_layers
        return tuple(self._number(name, item, low, high) for name, item in self._each_layer(key, n_layers))

    def integers(self, key: str, *, low: int = 1, high: int = LARGEST) -> tuple[int, ...]:
        """A list of integers."""
        values = self._list(key, "a list of integers")
        return tuple(self._integer(f"{key}[{i}]", value, low, high) for i, value in enumerate(values))

    def is_list(self, key: str) -> bool:
        """Whether the file has the key with a list as its value."""
        return self.has(key) and isinstance(self._get(key, None), (list, tuple, np.ndarray))

    def is_finite(self, key: str) -> bool:
        """Whether the file has the key with anything but an infinite number as its value."""
        value = self._get(key, math.inf)
        return not (isinstance(value, (float, np.floating)) and math.isinf(value))

    def flags(self, key: str) -> tuple[bool, ...]:
        """A list of truth values, which files also write as 0 and 1."""
        values = tuple(self._list(key, "a list of true and false"))
        if not all(isinstance(value, (bool, np.bool_, int, np.integer)) and value in (0, 1) for value in values):
            raise self._wrong(key, list(values), "a list of true and false")
        return tuple(bool(value) for value in values)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = tuple(self._list(key, "a list of strings"))
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key, list(values), "a list of strings")
        return values

    def _list(self, key: str, allowed: str) -> Any:
        value = self._get(key, None)
        if not isinstance(value, (list, tuple, np.ndarray)):
            raise self._wrong(key, value, allowed)
        return value

    def _each_layer(self, key: str, n_layers: int) -> list[tuple[str, Any]]:
        """A value for each layer with its name, for errors."""
        value = self._get(key, None)
        if not isinstance(value, (list, tuple, np.ndarray)):
            return [(key, value)] * n_layers
        if len(value) != n_layers:
            raise self._wrong(key, f"{len(value)} values", f"one value or {n_layers}, one per layer")
        return [(f"{key}[{i}]", item) for i, item in enumerate(value)]

    def _integer(self, key: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise self._wrong(key, value, "an integer")
        if not low <= value <= high:
            raise self._wrong(key, value, f"an integer from {low} to {high}")
        return int(value)

    def _number(self, key: str, value: Any, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise self._wrong(key, value, "a number")
        if not math.isfinite(value) or not low <= value <= high:
            raise self._wrong(key, value, f"a finite number from {low:g} to {high:g}")
        return float(value)

    def _get(self, key: str, default: Any) -> Any:
        spelled = self.spelled(key)
        self._read.add(spelled)
        value = self._metadata.get(f"{self._prefix}.{spelled}", default)
        if value is None:
            raise ModelFileError(
                f"metadata key {self._prefix}.{key} is missing, and this architecture needs it; convert the model again"
            )
        return value

    def _wrong(self, key: str, found: object, allowed: str) -> ModelFileError:
        shown = repr(found)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        name, bracket, index = key.partition("[")
        name = self.spelled(name)
        return ModelFileError(f"metadata key {self._prefix}.{name}{bracket}{index} is {shown}; allowed is {allowed}")
