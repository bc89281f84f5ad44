"""Layers of RWKV for tests/support/models/hybrid_models.py, and what their time mixing gives: loops in float64."""

import math

import numpy as np

from tests.support.models.recurrent_loops import sigmoid, silu

SIZE, RANK = 16, 16
STATED = {"wkv.head_size": SIZE, "token_shift_count": 2, "attention.layer_norm_epsilon": 1e-5}
FAMILIES = {
    "rwkv6": STATED | {"time_mix_extra_dim": RANK, "time_decay_extra_dim": RANK, "rescale_every_n_layers": 2},
    "rwkv7": STATED | {f"attention.{name}_lora_rank": RANK for name in ("decay", "iclr", "value_residual_mix", "gate")},
}


def rwkv_layer(family, width, ffn, rng, normal, norm):
    """Tensors of a layer, whose states remember some tens of tokens."""
    heads = width // SIZE
    slow = rng.uniform(-4.0, 0.0, width).astype(np.float32)

    def lerp(*shape):
        return rng.uniform(0, 1, shape).astype(np.float32)

    layer = {f"{name}.{part}": norm(width) for name in ("attn_norm", "attn_norm_2") for part in ("weight", "bias")}
    square = ["time_mix_receptance", "time_mix_key", "time_mix_value", "time_mix_output"]
    layer |= {"channel_mix_lerp_k.weight": lerp(1, 1, width), "channel_mix_key.weight": normal(ffn, width)}
    layer |= {"channel_mix_value.weight": normal(width, ffn), "time_mix_ln.weight": norm(width)}
    layer |= {"time_mix_ln.bias": normal(width)}
    if family == "rwkv6":
        square += ["time_mix_gate", "channel_mix_receptance"]
        layer |= {
            "channel_mix_lerp_r.weight": lerp(1, 1, width), "time_mix_lerp_x.weight": lerp(1, 1, width),
            "time_mix_lerp_fused.weight": lerp(5, 1, 1, width), "time_mix_w1.weight": normal(5 * RANK, width),
            "time_mix_w2.weight": normal(5, width, RANK), "time_mix_decay.weight": slow,
            "time_mix_decay_w1.weight": normal(RANK, width), "time_mix_decay_w2.weight": normal(width, RANK),
            "time_mix_first.weight": normal(heads, SIZE, gain=3.0),
        }  # fmt: skip
    else:
        layer |= {f"time_mix_{letter}1.weight": normal(RANK, width) for letter in "wavg"}
        layer |= {f"time_mix_{letter}2.weight": normal(width, RANK) for letter in "wavg"}
        layer |= {"time_mix_lerp_fused.weight": lerp(6, 1, 1, width), "time_mix_w0.weight": slow}
        layer |= {f"time_mix_{name}.weight": norm(width) for name in ("a0", "v0", "k_k", "k_a", "r_k")}
    return layer | {f"{name}.weight": normal(width, width, gain=2.0) for name in square}


def before(x):
    return np.concatenate((np.zeros((1, x.shape[1])), x[:-1])) - x


def head_norm(y, t):
    """Every head alone, then one weight and bias for all."""
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 64e-5)
    return y.reshape(len(y), -1) * t["time_mix_ln.weight"] + t["time_mix_ln.bias"]


def time_mix_6(x, t):
    change, rows = before(x), len(x)
    low = np.tanh((x + change * t["time_mix_lerp_x.weight"].ravel()) @ t["time_mix_w1.weight"].T).reshape(rows, 5, -1)
    inputs = []
    for i, lerp in enumerate(t["time_mix_lerp_fused.weight"].reshape(5, -1)):
        inputs.append(x + change * (lerp + low[:, i] @ t["time_mix_w2.weight"][i].T))
    xw, xk, xv, xr, xg = inputs
    names = (("receptance", xr), ("key", xk), ("value", xv))
    r, k, v = ((one @ t[f"time_mix_{name}.weight"].T).reshape(rows, -1, SIZE) for name, one in names)
    w = np.tanh(xw @ t["time_mix_decay_w1.weight"].T) @ t["time_mix_decay_w2.weight"].T + t["time_mix_decay.weight"]
    w, y = np.exp(-np.exp(w)).reshape(r.shape), np.zeros_like(r)
    for head in range(r.shape[1]):
        state = np.zeros((SIZE, SIZE))
        for token in range(rows):
            pair = np.outer(k[token, head], v[token, head])
            y[token, head] = r[token, head] @ (state + t["time_mix_first.weight"][head][:, None] * pair)
            state = w[token, head][:, None] * state + pair
    return (head_norm(y, t) * silu(xg @ t["time_mix_gate.weight"].T)) @ t["time_mix_output.weight"].T


def time_mix_7(x, t):
    """Of a first layer."""
    change, rows = before(x), len(x)
    xr, xw, xk, xv, xa, xg = (x + change * lerp for lerp in t["time_mix_lerp_fused.weight"].reshape(6, -1))
    names = (("receptance", xr), ("key", xk), ("value", xv))
    r, k, v = (one @ t[f"time_mix_{name}.weight"].T for name, one in names)
    w = np.tanh(xw @ t["time_mix_w1.weight"].T) @ t["time_mix_w2.weight"].T + t["time_mix_w0.weight"]
    w = np.exp(-math.exp(-0.5) * sigmoid(w))
    a = sigmoid(xa @ t["time_mix_a1.weight"].T @ t["time_mix_a2.weight"].T + t["time_mix_a0.weight"])
    removed = (k * t["time_mix_k_k.weight"]).reshape(rows, -1, SIZE)
    removed /= np.linalg.norm(removed, axis=-1, keepdims=True)
    k = k * (1 + (a - 1) * t["time_mix_k_a.weight"])
    r, w, k, v, a = (one.reshape(removed.shape) for one in (r, w, k, v, a))
    y, bonus = np.zeros_like(v), t["time_mix_r_k.weight"].reshape(-1, SIZE)
    for head in range(r.shape[1]):
        state = np.zeros((SIZE, SIZE))
        for token in range(rows):
            kappa = removed[token, head]
            change = np.diag(w[token, head]) - np.outer(kappa, kappa * a[token, head])
            state = state @ change + np.outer(v[token, head], k[token, head])
            y[token, head] = state @ r[token, head]
    given = (r * k * bonus).sum(-1, keepdims=True) * v
    gate = sigmoid(xg @ t["time_mix_g1.weight"].T) @ t["time_mix_g2.weight"].T
    return ((head_norm(y, t) + given.reshape(rows, -1)) * gate) @ t["time_mix_output.weight"].T


LOOPS = {"rwkv6": time_mix_6, "rwkv7": time_mix_7}
