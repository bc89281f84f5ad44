"""Hyper-parameters of RWKV's mixers: the time mixing of versions 6 and 7, which are recurrent, and channel mixing.

Letters beside those of `engine.model.config`: S columns of a head, M its state (S, S). x' is the layer's normalized
input of the token before, zero at the beginning of a sequence, and lerp(x, m) = x + (x' - x) · m, number by number.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.config.recurrent import RecurrentConfig


@dataclass(frozen=True, kw_only=True)
class TimeMixConfig(RecurrentConfig):
    """What the versions of time mixing share: H heads of S columns, D together."""

    heads: int  # H
    head_width: int  # S
    channel_mix: bool  # the layer's feed-forward part is a ChannelMixConfig, which keeps its last input as well

    @property
    def inner(self) -> int:
        """Numbers of all heads: D."""
        return self.heads * self.head_width

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The last input (D,), the state M (H, S, S) and, with channel mixing, its last input (D,)."""
        states = (self.inner,), (self.heads, self.head_width, self.head_width)
        return (*states, (self.inner,)) if self.channel_mix else states

    @property
    def row_width(self) -> int:
        """See RecurrentConfig.row_width."""
        return 16 * self.inner

    @property
    def normalized_widths(self) -> tuple[int, ...]:
        """See RecurrentConfig.normalized_widths."""
        return (self.head_width,)


@dataclass(frozen=True, kw_only=True)
class Rwkv6Config(TimeMixConfig):
    """Time mixing of RWKV-6 (Finch; arXiv 2404.05892).

    1. With five parts t of tanh(time_mix_w1 · lerp(x, lerp_x)), of mix_rank numbers each, the inputs are
    x_c = lerp(x, lerp_c + time_mix_w2_c · t_c) for c = w, k, v, r, g. 2. r, k and v are projections of theirs, k and v
    of kv_heads heads, which groups of heads share; w = exp(-exp(decay + decay_w2 · tanh(decay_w1 · x_w))), of
    decay_rank numbers inside; g = gate · x_g. 3. Per head y = r · (M + (first · k) ⊗ v); M = w · M + k ⊗ v, where w
    multiplies the rows. 4. time_mix_output · (norm(y) · silu(g)), where heads are normalized alone, without
    time_mix_ln's weights, and those are applied to all of them.

    With `linear_attention` (QRWKV6, which was a Qwen2 before): k is multiplied by 1 - w, M changes before y = r · M /
    sqrt(S), and step 4 has no norm and sigmoid(g).
    """

    kv_heads: int
    mix_rank: int
    decay_rank: int
    linear_attention: bool


@dataclass(frozen=True, kw_only=True)
class Rwkv7Config(TimeMixConfig):
    """Time mixing of RWKV-7 (Goose; arXiv 2503.14456).

    1. x_c = lerp(x, lerp_c) for c = r, w, k, v, a, g. 2. r, k and v are projections of theirs;
    w = exp(-exp(-1/2) · sigmoid(w0 + w2 · tanh(w1 · x_w))); a = sigmoid(a0 + a2 · a1 · x_a);
    g = g2 · sigmoid(g1 · x_g). In all layers but the first v = v + (v_first - v) · sigmoid(v0 + v2 · v1 · x_v), with
    v_first that of the first layer. 3. κ = k · k_k, each head at length 1; k = k · (1 + (a - 1) · k_a). 4. Per head,
    with M's rows for values and its columns for keys: M = M · diag(w) - (M κ) ⊗ (κ · a) + v ⊗ k; y = M r.
    5. time_mix_output · ((norm(y) + (Σ r · k · r_k) v) · g), the sum over a head; norm as in Rwkv6Config.
    """

    decay_rank: int
    rate_rank: int  # of a
    value_rank: int
    gate_rank: int  # 0 = no gate
    norm: bool
    first: bool  # the layer gives v_first

    @property
    def mixed(self) -> int:
        """Inputs that are mixed with those of the token before."""
        return 6 if self.gate_rank else 5


@dataclass(frozen=True, kw_only=True)
class ChannelMixConfig:
    """RWKV's feed-forward part: h = max(0, channel_mix_key · lerp(x, lerp_k))²; channel_mix_value · h.

    With `receptance` (RWKV-6) the result is multiplied by sigmoid(channel_mix_receptance · lerp(x, lerp_r)).
    """

    width: int
    receptance: bool
