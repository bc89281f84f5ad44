"""Hyper-parameters of a table of n-grams: vectors of the last few tokens that one layer adds to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.config.recurrent import RecurrentConfig

LEAST_GATE = 1e-6
"""Least magnitude that a gate's root is taken of."""


@dataclass(frozen=True, kw_only=True)
class NgramConfig(RecurrentConfig):
    """Vectors of n-grams that a layer adds to its input (Qwen 4 experimental).

    Letters beside those of skips.py: N longest n-gram, G heads of each length, P numbers of a row of the table.
    t_j is the token j before the one at hand. Tokens before the sequence count as `end`, and so do an `end` behind the
    token at hand and all before it.

    1. For each length n = 2 ... N, m_n = (t_0 · multiplier_0) xor ... xor (t_(n-1) · multiplier_(n-1)), modulo 2^64.
    Head h reads row offset_h + m_n mod size_h of the table; e is all rows side by side, (N - 1) · G · P numbers. 2. Of
    each stream s: g_s = ple_norm_key(ple_key · e)_s · ple_norm_query(x)_s / sqrt(D), where both norms act stream by
    stream; v_s = sigmoid(sign(g_s) · sqrt(max(|g_s|, 1e-6))) · (ple_value · e). 3. x + v + silu(c), where c of a
    channel is the weighted sum of W inputs, N tokens apart, of ple_norm_conv(v).

    A sequence keeps the inputs of the convolution and its last N - 1 tokens.
    """

    length: int  # N
    heads: int  # G
    width: int  # P
    conv_width: int  # W
    channels: int  # S · D
    end: int
    multipliers: tuple[int, ...]  # N
    offsets: tuple[int, ...]  # (N - 1) · G
    sizes: tuple[int, ...]  # (N - 1) · G

    @property
    def rows(self) -> int:
        """Rows that a token reads."""
        return (self.length - 1) * self.heads

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """conv_state (S · D, (W - 1) · N) and tokens (N - 1), 1 + their ids or 0 for none; the oldest come first."""
        return (self.channels, (self.conv_width - 1) * self.length), (self.length - 1,)

    @property
    def row_width(self) -> int:
        """See RecurrentConfig.row_width."""
        return 8 * self.channels
