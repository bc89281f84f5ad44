"""Residual connections that are more than a sum: one class per kind, with its formula.

What goes from layer to layer is then x (T, S · D): S streams. A part (the mixer of a layer, its feed-forward part)
reads h (T, D) made of them, and what it gives, f(h), changes them. Without a class of this file S = 1, h = x and x
becomes x + f(x).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class SkipKind(Enum):
    """The classes below, as declarations of families name them."""

    NORMED_SKIP = "normed_skip"
    BANKED = "banked"
    HYPER = "hyper"
    GATED = "gated"
    MIXED = "mixed"
    MIXED_AND_WEIGHTED = "mixed_and_weighted"
    STACKS = "stacks"


@dataclass(frozen=True, kw_only=True)
class NormedSkip:
    """What skips a part is normalized too (MiniMax-01; arXiv 2501.08313).

    S = 1. h = norm(x), with the norm before the part; x becomes scale · h + f(h).
    """

    scale: float


@dataclass(frozen=True, kw_only=True)
class BankedSkip:
    """Attention over earlier states of the residual stream (attention residuals, Kimi K3).

    x holds the running sum r and the states that were banked. With the scores s(v) = score · v / sqrt(mean(v²) + ε) of
    each, h is their sum weighted by softmax(s), and so is what the head reads; r + f(h) is the new sum. The mixer of
    every layer whose number is a multiple of `block` banks r and begins the sum anew: it becomes f(h).
    """

    block: int


@dataclass(frozen=True, kw_only=True)
class HyperSkip:
    """Hyper-connections between S streams (Zhu et al. 2024, arXiv 2409.19606), low-rank gates as in Qwen 4.

    All streams begin as the embedding. n_s = norm_s(x_s), n the streams side by side, u = up · silu(down · n / S);
    h = mean over s of n_s · sigmoid(u_s), and so is what the head reads; x_s becomes
    x_s + 2 · sigmoid((inject · n)_s / S) · f(h).
    """

    count: int  # S
    rank: int


@dataclass(frozen=True, kw_only=True)
class GatedSkip:
    """Independent hyper-connections between S streams, with one gate per stream and direction (Hunyuan 4).

    All streams begin as the embedding. n are the streams side by side, normalized together without a weight, and
    [u, v] = fn · n, S numbers each. h = Σ x_s · (sigmoid(scale_0 · u_s + base_s) + ε), and so is what the head reads,
    by weights of its own; x_s becomes x_s + (magnitude · sigmoid(scale_1 · v_s + base_{S + s}) + ε) · f(h).
    """

    count: int  # S
    epsilon: float
    magnitude: float


@dataclass(frozen=True, kw_only=True)
class MixedSkip:
    """Hyper-connections whose S streams mix by a doubly stochastic matrix (manifold-constrained, GLM 5.3 Flash).

    As GatedSkip, but: [u, v, m] = fn · n with S · S more numbers m; what is written has the factor
    2 · sigmoid(scale_1 · v_s + base_{S + s}); and x_s becomes that times f(h), plus Σ_r C_rs · x_r. C begins as softmax
    over s of scale_2 · m_rs + base_{2 · S + r · S + s}, plus ε; then columns, and `iterations` - 1 times rows and
    columns, are divided by their sums plus ε. The head reads the mean of all streams, or what GatedSkip's head does
    (DeepSeek V4).
    """

    count: int  # S
    epsilon: float
    iterations: int
    weighted_head: bool = False


@dataclass(frozen=True, kw_only=True)
class StackSkip:
    """Two states that a low and a high stack of layers change in turns (hierarchical reasoning, HRM-Text).

    S = 3: states a and b, and a residual stream r. a begins as the embedding and b as hrm.z_l_init. A pass runs the
    layers of a stack over r = a + b; normalized without a weight the result becomes b after each of `low` passes of the
    low stack, and a after the pass of the high stack that follows. That happens `cycles` times; the head reads a.
    """

    layers: int  # of a stack
    low: int
    cycles: int

    @property
    def n_layers(self) -> int:
        """Layers that a token passes."""
        return self.layers * (self.low + 1) * self.cycles

    def is_high(self, index: int) -> bool:
        """Whether layer `index` of those that a token passes belongs to the high stack."""
        return index // self.layers % (self.low + 1) == self.low

    def block(self, index: int) -> int:
        """Number of that layer in the file, which has the low stack first."""
        return index % self.layers + (self.layers if self.is_high(index) else 0)


SkipConfig = NormedSkip | BankedSkip | HyperSkip | GatedSkip | MixedSkip | StackSkip
"""How what skips the parts of a model is joined with what they give."""


def most_streams(skip: SkipConfig | None, n_layers: int) -> int:
    """The largest S in a model."""
    if isinstance(skip, (HyperSkip, GatedSkip, MixedSkip)):
        return skip.count
    if isinstance(skip, BankedSkip):
        return 1 + -(-n_layers // skip.block)
    if isinstance(skip, StackSkip):
        return 3
    return 1
