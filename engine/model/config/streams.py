"""A residual stream of several vectors per token: its formula. Letters as in `engine.model.config`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AltUpConfig:
    """A residual stream of several vectors per token, of which one passes through a layer (AltUp; arXiv 2301.13310).

    r(x) = tanh(altup_router · altup_router_norm(x) / D), A numbers. 1. Prediction: p_a = x_a + Σ_b c_ab x_b, with the
    (A, A) numbers c = altup_predict_coef · r(x_active). 2. The layer makes z of p_active. 3. Correction:
    x_a = p_a + (1 + d_a) · (z - p_active), with d = altup_correct_coef · r(z). 4. What LayerConfig says of
    per_layer_width reads altup_correct_scale · x_active and is added to all x_a but the first.

    At the beginning x_0 is the token's vector e, and x_a is altup_proj_a · e at the length of e. At the end the mean is
    taken of x_0 and of altup_unembd_proj_a · x_a at the length of x_active.
    """

    count: int  # A
    active: int
