"""Hyper-parameters of recurrent mixers: one class per kind, with its formula.

Letters beside those of `engine.model.config`: I channels, S states of a channel, W width of a convolution, G groups.
A state is zero before a sequence's first token. conv(x) is, per channel, the weighted sum of its last W inputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


class RecurrentConfig(ABC):
    """A mixer whose sequences keep a state of fixed size."""

    @property
    @abstractmethod
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the arrays that a sequence keeps, float32."""

    @property
    def state_bytes(self) -> int:
        """Bytes of these arrays."""
        return sum(4 * math.prod(shape) for shape in self.state_shapes)

    @property
    @abstractmethod
    def row_width(self) -> int:
        """Numbers that a token takes between the products of the layer, at most."""

    @property
    def normalized_widths(self) -> tuple[int, ...]:
        """Widths of the vectors that are normalized inside the mixer."""
        return ()


@dataclass(frozen=True, kw_only=True)
class ShortConvConfig(RecurrentConfig):
    """Gated short convolution (LFM2; arXiv 2511.23404), with as many channels as the model is wide.

    [b, c, u] = in_proj · x, D numbers each; out_proj · (c · conv(b · u)).
    """

    inner: int  # D
    conv_width: int  # W

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """conv_state (D, W - 1): the last b · u of every channel, the oldest first."""
        return ((self.inner, self.conv_width - 1),)

    @property
    def row_width(self) -> int:
        """See RecurrentConfig.row_width."""
        return 6 * self.inner


@dataclass(frozen=True, kw_only=True)
class MambaConfig(RecurrentConfig):
    """Selective state space of one layer (Mamba 1; Gu and Dao 2023, arXiv 2312.00752), with I channels and states of S.

    1. [u, z] = ssm_in · x, I numbers each. 2. u = silu(conv(u) + bias). 3. [d, B, C] = ssm_x · u, of dt_rank, S and S
    numbers, each normalized (RMS, with a weight where `norm_weights`) where `norm_dt_b_c`; Δ = softplus(ssm_dt · d +
    bias), per channel. 4. The state h (I, S) becomes h · exp(Δ · ssm_a) + (Δ · u) ⊗ B, and y = h · C + ssm_d · u.
    5. ssm_out · (y · silu(z)).
    """

    inner: int  # I
    state: int  # S
    conv_width: int  # W
    dt_rank: int
    norm_dt_b_c: bool = False
    norm_weights: bool = False

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """conv_state (I, W - 1), oldest input first, and ssm_state (I, S)."""
        return (self.inner, self.conv_width - 1), (self.inner, self.state)

    @property
    def row_width(self) -> int:
        """See RecurrentConfig.row_width."""
        return 8 * self.inner

    @property
    def normalized_widths(self) -> tuple[int, ...]:
        """See RecurrentConfig.normalized_widths."""
        return (self.dt_rank, self.state) if self.norm_dt_b_c else ()


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(RecurrentConfig):
    """State space with one decay per head (Mamba 2; Dao and Gu 2024, arXiv 2405.21060).

    I channels are H heads of P = I / H; B and C are shared by the H / G heads of a group. 1. [z, v, d] = ssm_in · x, of
    I, I + 2 · G · S and H numbers; v = silu(conv(v) + bias) is [u (H, P), B (G, S), C (G, S)]; Δ = softplus(d + bias),
    per head. 2. The state h (H, P, S) becomes exp(Δ · ssm_a) · h + (Δ · u) ⊗ B, and y = h · C + ssm_d · u.
    3. y = y · silu(z), each group of I / G normalized (RMS, ssm_norm) where `norm`; ssm_out · y.
    """

    inner: int  # I
    state: int  # S
    conv_width: int  # W
    heads: int  # H
    groups: int  # G
    norm: bool = True

    @property
    def convolved(self) -> int:
        """Channels of the convolution."""
        return self.inner + 2 * self.groups * self.state

    @property
    def head_width(self) -> int:
        """P."""
        return self.inner // self.heads

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """conv_state (I + 2 · G · S, W - 1), oldest input first, and ssm_state (H, P, S)."""
        return (self.convolved, self.conv_width - 1), (self.heads, self.head_width, self.state)

    @property
    def row_width(self) -> int:
        """See RecurrentConfig.row_width."""
        return 4 * self.inner + 4 * self.convolved

    @property
    def normalized_widths(self) -> tuple[int, ...]:
        """See RecurrentConfig.normalized_widths."""
        return (self.inner // self.groups,) if self.norm else ()


@dataclass(frozen=True, kw_only=True)
class Plamo2Config(RecurrentConfig):
    """State space with one decay per head, whose B, C and steps are made of the convolved input (PLaMo 2).

    I channels are H heads of P = I / H. 1. ssm_in · x has per head P numbers of z, then P of u; u = silu(conv(u)).
    2. [B, C, d] = ssm_x · u, of S, S and dt_rank numbers, each normalized (RMS, with ssm_b_norm, ssm_c_norm and
    ssm_dt_norm); Δ = softplus(ssm_dt · d + bias), per head. 3. As Mamba2Config with one group: h becomes
    exp(Δ · ssm_a) · h + (Δ · u) ⊗ B, and y = h · C + ssm_d · u. 4. ssm_out · (y · silu(z)).
    """

    inner: int  # I
    state: int  # S
    conv_width: int  # W
    heads: int  # H
    dt_rank: int

    @property
    def head_width(self) -> int:
        """P."""
        return self.inner // self.heads

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """conv_state (I, W - 1), oldest input first, and ssm_state (H, P, S)."""
        return (self.inner, self.conv_width - 1), (self.heads, self.head_width, self.state)

    @property
    def row_width(self) -> int:
        """See RecurrentConfig.row_width."""
        return 8 * self.inner + 2 * (self.dt_rank + 2 * self.state)

    @property
    def normalized_widths(self) -> tuple[int, ...]:
        """See RecurrentConfig.normalized_widths."""
        return self.dt_rank, self.state


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(RecurrentConfig):
    """Gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464), as Qwen3-Next has it.

    G key heads and H value heads of S columns; value head h reads key head h // (H / G) where `grouped`, else h mod G.
    1. [q, k, v] = silu(conv(attn_qkv · x)), q and k of G · S numbers, v of H · S; q and k of a head are divided by
    sqrt(Σ² + ε), q also by sqrt(S). 2. Per head β = sigmoid(ssm_beta · x), g = ssm_a · softplus(ssm_alpha · x + bias).
    3. The state M (H, S, S), one row per key column, is multiplied by exp(g); then M += k ⊗ β (v - k · M) and
    y = q · M. 4. Each head of y is normalized (RMS, ssm_norm) and multiplied by silu(attn_gate · x), or by its
    sigmoid where `sigmoid_gate`; ssm_out · y.
    """

    key_heads: int  # G
    heads: int  # H
    head_width: int  # S
    conv_width: int  # W
    grouped: bool
    sigmoid_gate: bool = False

    @property
    def keys(self) -> int:
        """Numbers of all q heads, and of all k heads."""
        return self.key_heads * self.head_width

    @property
    def inner(self) -> int:
        """Numbers of all value heads."""
        return self.heads * self.head_width

    @property
    def convolved(self) -> int:
        """Channels of the convolution."""
        return 2 * self.keys + self.inner

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """conv_state (channels, W - 1), oldest input first, and the state M (H, S, S)."""
        return (self.convolved, self.conv_width - 1), (self.heads, self.head_width, self.head_width)

    @property
    def row_width(self) -> int:
        """See RecurrentConfig.row_width."""
        return 3 * self.convolved + 6 * self.inner

    @property
    def normalized_widths(self) -> tuple[int, ...]:
        """See RecurrentConfig.normalized_widths."""
        return (self.head_width,)


@dataclass(frozen=True, kw_only=True)
class KimiDeltaConfig(RecurrentConfig):
    """Delta rule with a decay for every key column (Kimi Delta Attention, arXiv 2510.26692).

    As DeltaNetConfig with H heads of each kind, but: 1. q, k and v have projections and convolutions of their own.
    2. g = ssm_a · softplus(ssm_f_b · ssm_f_a · x + bias) has S numbers per head, and row i of M is multiplied by
    exp(g_i); with a floor g = floor · sigmoid(ssm_a · (ssm_f_b · ssm_f_a · x + bias)) instead. 4. Heads of y are
    multiplied by sigmoid(ssm_g_b · ssm_g_a · x); the last product is attn_output. ssm_f_a and ssm_g_a may have all rows
    themselves, without a second matrix.
    """

    heads: int  # H
    head_width: int  # S
    conv_width: int  # W
    decay_floor: float | None = None  # below zero; g does not fall below it
    unit_epsilon: float | None = None  # ε of the lengths of q and k; None = that of the norms

    @property
    def inner(self) -> int:
        """Numbers of all heads."""
        return self.heads * self.head_width

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """conv_state (3 · H · S, W - 1) of q, k and v, oldest input first, and the state M (H, S, S)."""
        return (3 * self.inner, self.conv_width - 1), (self.heads, self.head_width, self.head_width)

    @property
    def row_width(self) -> int:
        """See RecurrentConfig.row_width."""
        return 16 * self.inner

    @property
    def normalized_widths(self) -> tuple[int, ...]:
        """See RecurrentConfig.normalized_widths."""
        return (self.head_width,)


@dataclass(frozen=True, kw_only=True)
class LightningConfig(RecurrentConfig):
    """Linear attention with a fixed decay per head (lightning attention of MiniMax-01, arXiv 2501.08313).

    1. [q, k, v] = silu(attn_qkv · x), of S numbers each for every one of H heads in turn. 2. The state M (H, S, S), one
    row per key column, becomes exp(-rate · slope) · M + k ⊗ v, where slope is the head's slope of linear biases
    (rope.alibi_slopes with a largest bias of 8), and y = q · M. 3. y of all heads is normalized together (RMS,
    attn_norm_2) and multiplied by sigmoid(attn_gate · x); attn_output · y.
    """

    heads: int  # H
    head_width: int  # S
    rate: float

    @property
    def inner(self) -> int:
        """Numbers of all heads."""
        return self.heads * self.head_width

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The state M (H, S, S)."""
        return ((self.heads, self.head_width, self.head_width),)

    @property
    def row_width(self) -> int:
        """See RecurrentConfig.row_width."""
        return 8 * self.inner

    @property
    def normalized_widths(self) -> tuple[int, ...]:
        """See RecurrentConfig.normalized_widths."""
        return (self.inner,)
