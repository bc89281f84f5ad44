"""The tensors of a file as the declaration of its family reads them: which biases, scales and norms there are."""

from __future__ import annotations

from engine.model.architecture import Architecture
from engine.model.building.tensors import TensorTable
from engine.model.config import ModelConfig
from engine.model.parts import Presence
from engine.model.weights import ExpertLinear, Linear, Norm


class TensorSource:
    """What the builders of all parts share.

    Every method raises UnsupportedModelError where a tensor is missing, or of another shape or type than needed.

    Attributes:
        architecture: the declaration.
        config: the model.
        tensors: the file's tensors.
    """

    def __init__(self, architecture: Architecture, config: ModelConfig, tensors: TensorTable) -> None:
        self.architecture = architecture
        self.config = config
        self.tensors = tensors
        self._feed_forward_scales = architecture.ffn is not None and architecture.ffn.scales

    @property
    def width(self) -> int:
        """D."""
        return self.config.width

    def linear(self, name: str, rows: int, columns: int) -> Linear:
        """A projection."""
        scale = name.rpartition(".")[2] not in self.architecture.unused_scales
        return self.tensors.linear(name, rows, columns, bias=self._bias(name), scale=scale)

    def feed_forward_linear(self, name: str, rows: int, columns: int) -> Linear:
        """A projection of a feed-forward part: its scale multiplies its bias too, or has no effect in this family."""
        bias, scale = self._bias(name), self._feed_forward_scales
        return self.tensors.linear(name, rows, columns, bias=bias, scale=scale, scale_after_bias=True)

    def experts(self, name: str, n_experts: int, rows: int, columns: int) -> ExpertLinear:
        """A stack of projections, one per expert."""
        bias, scale = self._bias(name), self._feed_forward_scales
        return self.tensors.experts(name, n_experts, rows, columns, bias=bias, scale=scale)

    def norm(
        self, name: str, shape: tuple[int, ...], *, optional_bias: bool = False, epsilon: float | None = None
    ) -> Norm:
        """A normalization.

        Args:
            name: of its tensors.
            shape: of its weight.
            optional_bias: its bias may be missing where the family's norms have one.
            epsilon: None = that of the model.
        """
        config, parts = self.config, self.architecture.norm
        bias = Presence.OPTIONAL if optional_bias and parts.bias is Presence.ALWAYS else parts.bias
        epsilon = config.norm_epsilon if epsilon is None else epsilon
        return self.tensors.norm(name, shape, config.norm, epsilon, weight=parts.weight, bias=bias)

    def first_norm(
        self, prefix: str, names: tuple[str, ...], *, epsilon: float | None = None, optional: bool = False
    ) -> Norm | None:
        """The first of these norms that the file has; the last one is asked for without looking, unless optional."""
        if not names or (optional and not any(self.tensors.has(f"{prefix}.{name}.weight") for name in names)):
            return None
        found = next((name for name in names if self.tensors.has_any(f"{prefix}.{name}", "", ".weight")), names[-1])
        return self.norm(f"{prefix}.{found}", (self.width,), epsilon=epsilon)

    def _bias(self, name: str) -> Presence:
        part, biases = name.rpartition(".")[2], self.architecture.biases
        if part in biases.unused:
            self.tensors.ignore((f"{name}.bias",))
            return Presence.NEVER
        return Presence.ALWAYS if part in biases.required else Presence.OPTIONAL
