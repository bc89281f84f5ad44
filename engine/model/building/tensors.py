"""Hands out a file's tensors by name, checks every shape, and lists those that nothing asked for."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

import numpy as np

from engine.errors import UnsupportedModelError
from engine.gguf.quants import dequantize
from engine.gguf.reader import GGUFFile
from engine.gguf.types import GGMLType
from engine.model.config import NormKind
from engine.model.parts import Presence
from engine.model.weights import ExpertLinear, Float32Array, Linear, Norm, Weight

MATTERS = (
    "altup_",
    "blk.",
    "conv1d",
    "convnext.",
    "dec.",
    "enc.",
    "hrm.",
    "model.layers.",
    "output",
    "per_layer_",
    "position_embd",
    "posnet.",
    "rope_",
    "token_embd",
    "token_types",
)
"""Beginnings of names of tensors that take part in the computation of the families that have them."""


class TensorTable:
    """The tensors of one file, each to be asked for by the part of the model that uses it.

    Every method raises UnsupportedModelError naming the tensor, with the shape found and expected.
    """

    def __init__(self, gguf: GGUFFile, architecture: str) -> None:
        self._gguf = gguf
        self._architecture = architecture
        self._unused = set(gguf.tensors)

    def has(self, name: str) -> bool:
        """Whether the file has the tensor."""
        return name in self._gguf.tensors

    def has_any(self, name: str, *suffixes: str) -> bool:
        """Whether the file has the tensor with one of these endings."""
        return any(self.has(name + suffix) for suffix in suffixes)

    def ignore(self, names: Iterable[str]) -> None:
        """Accept tensors that take no part in the computation; "blk.*.x" names x of every layer."""
        for name in names:
            self._unused.difference_update(fnmatch.filter(self._unused, name) if "*" in name else (name,))

    def ignore_layers(self, layers: range) -> None:
        """Accept all tensors of layers of these numbers."""
        prefixes = tuple(f"blk.{layer}." for layer in layers)
        self._unused = {name for name in self._unused if not name.startswith(prefixes)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, outermost first."""
        if name not in self._gguf.tensors:
            raise UnsupportedModelError(
                f"tensor {name} is missing; architecture {self._architecture!r} needs it: take a complete file"
            )
        return self._gguf.tensors[name].shape

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """A packed matrix or stack of matrices."""
        self._check(name, shape)
        info = self._gguf.tensors[name]
        self._unused.discard(name)
        raw = self._gguf.raw(name)
        if len(info.shape) != len(shape):  # a matrix of one row may be stored as a vector
            raw = raw.reshape(*shape[:-1], raw.shape[-1])
        return Weight(name, info.type, shape, raw)

    def vector(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """A small array, as float32."""
        self._check(name, shape)
        self._unused.discard(name)
        values = dequantize(self._gguf.raw(name), self._gguf.tensors[name].type).reshape(shape)
        return np.ascontiguousarray(values, dtype=np.float32)

    def array(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """A small array, which files may store with further dimensions of 1."""
        found = self.shape(name)
        same = [size for size in found if size > 1] == [size for size in shape if size > 1]
        return self.vector(name, found if same else shape).reshape(shape)

    def row(self, name: str, columns: int) -> Float32Array:
        """The first row of a matrix of this width, or a vector, as float32."""
        found = self.shape(name)
        if found[-1] != columns or len(found) > 2:
            raise UnsupportedModelError(f"tensor {name} has shape {found}; its metadata calls for (rows, {columns})")
        self._unused.discard(name)
        rows = self._gguf.raw(name).reshape(-1, self._gguf.raw(name).shape[-1])[:1]
        return np.ascontiguousarray(dequantize(rows, self._gguf.tensors[name].type).reshape(columns), dtype=np.float32)

    def optional_vector(self, name: str, shape: tuple[int, ...]) -> Float32Array | None:
        """A small array, or None where the file lacks it."""
        return self.vector(name, shape) if self.has(name) else None

    def norm(
        self, name: str, shape: tuple[int, ...], kind: NormKind, epsilon: float, *, weight: bool, bias: Presence
    ) -> Norm:
        """A normalization: name.weight and name.bias, both of this shape, where the family has them.

        Some files have the weight under the name alone.
        """
        weight_name = name if self.has(name) else f"{name}.weight"
        factor = self.vector(weight_name, shape) if weight else None
        return Norm(kind, epsilon, factor, self._bias(name, shape, bias))

    def linear(
        self,
        name: str,
        rows: int,
        columns: int,
        *,
        bias: Presence = Presence.OPTIONAL,
        scale: bool = True,
        scale_after_bias: bool = False,
    ) -> Linear:
        """A projection: name.weight (rows, columns), with name.bias and name.scale where the file has them.

        Args:
            name: the tensors' common name.
            rows: outputs.
            columns: inputs.
            bias: whether there is one.
            scale: False = name.scale is accepted and has no effect, but on NVFP4, of whose numbers it is a part.
            scale_after_bias: name.scale multiplies the bias too.
        """
        weight = self.weight(f"{name}.weight", (rows, columns))
        offset = self._bias(name, (rows,), bias)
        factor = self._scale(name, 1) if scale or weight.type is GGMLType.NVFP4 else None
        self._ignore_scales(name)
        if offset is not None and factor is not None and scale_after_bias:
            offset = offset * factor
        return Linear(weight, offset, 1.0 if factor is None else float(factor[0]))

    def experts(
        self,
        name: str,
        n_experts: int,
        rows: int,
        columns: int,
        *,
        bias: Presence = Presence.OPTIONAL,
        scale: bool = True,
    ) -> ExpertLinear:
        """A stack of projections: name.weight (E, rows, columns), with name.bias (E, rows) and name.scale (E,)."""
        weight = self.weight(f"{name}.weight", (n_experts, rows, columns))
        offsets = self._bias(name, (n_experts, rows), bias)
        factors = self._scale(name, n_experts) if scale or weight.type is GGMLType.NVFP4 else None
        self._ignore_scales(name)
        return ExpertLinear(weight, offsets, factors)

    def finish(self, *, strict: bool = False) -> tuple[str, ...]:
        """The unused tensors that are not known to take part in a computation; with `strict` there are none.

        Raises:
            UnsupportedModelError: unused tensors are known to take part, or, with `strict`, there are any.
        """
        refused = sorted(name for name in self._unused if strict or name.startswith(MATTERS))
        if refused:
            raise UnsupportedModelError(
                f"architecture {self._architecture!r} has no use for these tensors: {listed(refused)}"
            )
        return tuple(sorted(self._unused))

    def _bias(self, name: str, shape: tuple[int, ...], presence: Presence) -> Float32Array | None:
        if presence is Presence.NEVER:
            return None
        read = self.optional_vector if presence is Presence.OPTIONAL else self.vector
        return read(f"{name}.bias", shape)

    def _scale(self, name: str, count: int) -> Float32Array | None:
        return self.optional_vector(f"{name}.scale", (count,))

    def _ignore_scales(self, name: str) -> None:
        # input_scale says how to round the inputs of a product to few bits; here inputs stay float32.
        self.ignore((f"{name}.scale", f"{name}.input_scale"))

    def _check(self, name: str, expected: tuple[int, ...]) -> None:
        found = self.shape(name)
        if found != expected and _squeezed(found) != _squeezed(expected):
            raise UnsupportedModelError(f"tensor {name} has shape {found}; its metadata calls for {expected}")


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without leading ones, which some files leave out or add."""
    start = 0
    while start < len(shape) - 1 and shape[start] == 1:
        start += 1
    return shape[start:]
