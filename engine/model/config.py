"""Hyper-parameters of a model as frozen dataclasses, layer by layer.

Pure description: nothing here reads a file or touches an array. `engine.model.hyperparameters` fills it from metadata.
Letters used in all docstrings of this package: T tokens, D width, H heads, K key/value heads, Hd head width,
F feed-forward width, E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class NormKind(Enum):
    """How a vector is normalized before its weight is applied."""

    RMS = "rms"  # x / sqrt(mean(x²) + ε)


class RopeStyle(Enum):
    """Which elements of a head are rotated together."""

    NORM = "norm"  # adjacent pairs (0,1), (2,3), ...
    NEOX = "neox"  # half split: (0, n/2), (1, n/2 + 1), ...


class RopeScaling(Enum):
    """How rotation frequencies are stretched beyond the trained context; the values are the names used in metadata."""

    NONE = "none"
    LINEAR = "linear"
    YARN = "yarn"


class Activation(Enum):
    """Non-linearity of a feed-forward part."""

    SILU = "silu"  # x · sigmoid(x)
    GELU = "gelu"  # the tanh approximation


class Routing(Enum):
    """How router scores become expert probabilities."""

    SOFTMAX = "softmax"  # over all experts, before the best are chosen


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer.

    `factor` is the context stretch s (1 = none). The YaRN fields follow Peng et al. 2023 (arXiv 2309.00071):
    `extrapolation` blends interpolated and original frequencies, `attention_factor` multiplies cos and sin,
    `log_multiplier` (mscale_all_dim; 0 = absent) divides that magnitude again.
    """

    style: RopeStyle
    n_rot: int
    base: float
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0
    original_context: int = 0
    extrapolation: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    log_multiplier: float = 0.0


@dataclass(frozen=True)
class AttentionTemperature:
    """Queries at position p are multiplied by 1 + scale · ln(1 + floor(p / length))."""

    scale: float
    length: int


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention of one layer: H query heads share K key/value heads."""

    n_heads: int
    n_kv_heads: int
    key_width: int
    value_width: int
    scale: float  # multiplies q·k
    rope: RopeConfig | None
    window: int | None = None  # a query sees this many positions, itself included; None = all
    qk_norm: bool = False  # every head of q and k is normalized before rotation
    temperature: AttentionTemperature | None = None

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads


@dataclass(frozen=True, kw_only=True)
class FfnConfig:
    """Feed-forward part: down(activation(gate(x)) · up(x)), or down(activation(up(x))) where not gated."""

    width: int
    activation: Activation
    gated: bool = True


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts: the router picks `n_used` of `n_experts` gated feed-forward parts per token."""

    n_experts: int
    n_used: int
    expert: FfnConfig
    routing: Routing = Routing.SOFTMAX
    normalize: bool = True  # the chosen weights are divided by their sum
    weight_scale: float = 1.0
    shared: FfnConfig | None = None  # an expert that every token passes through
    shared_gate: bool = False  # its output is multiplied by sigmoid(a learned score)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer: norm → attention → residual → norm → feed-forward → residual."""

    index: int
    attention: AttentionConfig
    ffn: FfnConfig | MoeConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything about a model that is not a weight."""

    architecture: str
    name: str
    width: int
    vocab_size: int
    context_length: int  # trained; the limit of a run is a run-time setting
    norm: NormKind
    norm_epsilon: float
    layers: tuple[LayerConfig, ...]

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)
