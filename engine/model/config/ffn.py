"""Hyper-parameters of feed-forward parts and of mixtures of experts, with their formulas.

What reads the layer's input and what is added to it, model.py says.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Activation(Enum):
    """Non-linearity f of a feed-forward part: h = f(gate) · up, or h = f(up) where it has no gate."""

    SILU = "silu"  # x · sigmoid(x)
    # The tanh approximation x/2 · (1 + tanh(sqrt(2/π) · (x + 0.044715 x³))), of x rounded to float16 and rounded to
    # float16 again while |x| < 10, and max(x, 0) beyond: what ggml computes, and so what reference logits hold. The
    # roundings matter at 1e-7 of a result's square.
    GELU = "gelu"
    RELU = "relu"  # max(x, 0)
    RELU_SQUARED = "relu_squared"  # max(x, 0)²
    # Gated only: g = min(gate, 7), u = clamp(up, -7, 7); h = g · sigmoid(1.702 g) · (u + 1).
    SWIGLU_CLAMPED = "swiglu_clamped"
    # Gated only: b · tanh(gate / b) · sigmoid(gate) · c · tanh(up / c), or · up where c is 0, with (b, c) =
    # FfnConfig.caps.
    SITU = "situ"
    # Ungated only, with (a, b, β, ε) = FfnConfig.xielu: a x² + β x above zero, else b · (exp(min(x, ε)) - 1 - x) + β x
    # (arXiv 2411.13010).
    XIELU = "xielu"


class Routing(Enum):
    """How router scores s become expert weights p, from which the best are chosen."""

    SOFTMAX = "softmax"  # softmax over all experts
    SIGMOID = "sigmoid"  # sigmoid of each score
    SQRT_SOFTPLUS = "sqrt_softplus"  # sqrt(ln(1 + exp(s))) of each score
    SOFTMAX_CHOSEN = "softmax_chosen"  # the best are chosen by s; p is the softmax over the chosen alone


@dataclass(frozen=True, kw_only=True)
class FfnConfig:
    """Feed-forward part: down(activation(gate(x)) · up(x)), or down(activation(up(x))) where not gated.

    With a limit (gated parts only) down(min(activation(gate(x)), limit) · max(-limit, min(up(x), limit))); where
    limits_gate it is activation(min(gate(x), limit)) instead.
    With `sparsity` s above zero the gate g of a token becomes max(0, g - mean(g) - s · deviation(g)) before the
    activation, with the deviation of a sample (Gemma 3n).
    """

    width: int
    activation: Activation
    gated: bool = True
    limit: float | None = None
    limits_gate: bool = False
    caps: tuple[float, float] | None = None  # of Activation.SITU
    sparsity: float = 0.0
    xielu: tuple[float, float, float, float] | None = None  # of Activation.XIELU
    sub_norm: bool = False  # what down reads is normalized by ffn_sub_norm


@dataclass(frozen=True, kw_only=True)
class AdjugateConfig:
    """Small experts that groups of experts share (GroveMoE; arXiv 2508.07785).

    With y what the mixture gives, y + scale · the sum of w_g · adjugate_g(y) over the groups g of the best n_used
    experts; w are the router's p of the experts whose numbers are g, divided by their sum.
    """

    per_group: int  # consecutive experts of a group
    n_used: int
    expert: FfnConfig
    scale: float


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts: the router picks `n_used` of `n_experts` feed-forward parts per token.

    1. p = routing(router x). 2. Choice by p + selection bias (weights.selection_bias; the bias has no part in 4), or
    where by_token by the token alone (weights.token_experts). 3. With n_groups > 1 the experts are consecutive groups;
    a group's score is the sum of its two best choice scores, and only experts of the best n_groups_used groups can be
    chosen. 4. The chosen p are divided by their sum where `normalize` (not below 2^-14), and multiplied by
    weight_scale. 5. The sum over the chosen of weight · expert(x), or of expert(weight · x) where weights_inputs.
    6. The shared part's output is added, times shared_scale and gated where shared_gate.

    With a latent_width the experts of 5. read latent_down · x and give as many numbers; of their sum s (normalized
    where the weights have a norm) latent_up · s is taken. Router and shared part read x.
    With `separate_norms` router and experts do not read the layer's ffn_norm(x), as the shared part does, but norms of
    their own, and the outputs of the experts and of the shared part are normalized before they are added (Gemma 4).
    """

    n_experts: int
    n_used: int
    expert: FfnConfig
    routing: Routing = Routing.SOFTMAX
    normalize: bool = True
    weight_scale: float = 1.0
    n_groups: int = 1
    n_groups_used: int = 1
    shared: FfnConfig | None = None  # an expert that computes every token
    shared_gate: bool = False  # its output is multiplied by sigmoid(a learned score)
    shared_scale: float = 1.0  # in the weights it is a factor of the part's down
    weights_inputs: bool = False
    routed_early: bool = False  # the router reads the layer's input, before the mixer and its norm
    adjugate: AdjugateConfig | None = None
    reads_input: bool = False  # router and experts, but not the shared part, read ffn_norm_exps(the layer's input)
    latent_width: int | None = None  # numbers that an expert reads and gives, where these are not D
    separate_norms: bool = False
    by_token: bool = False
