"""Recurrent mixers from their definitions, number by number in float64.

x (T, D) are the normalized inputs of one layer, t its tensors without prefix; results are (T, D), before the residual.
"""

import math
from functools import partial

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, weight, epsilon=1e-5):
    return x / math.sqrt(sum(one * one for one in x) / len(x) + epsilon) * weight


def convolve(inputs, weight, bias=None):
    out = np.zeros_like(inputs)
    taps = weight.shape[-1]
    for token in range(len(inputs)):
        for back in range(min(taps, token + 1)):
            out[token] += weight[..., taps - 1 - back] * inputs[token - back]
    return out if bias is None else out + bias


def short_conv(x, t):
    b, c, u = np.split(x @ t["shortconv.in_proj.weight"].T, 3, axis=1)
    return (c * convolve(b * u, t["shortconv.conv.weight"])) @ t["shortconv.out_proj.weight"].T


def mamba_1(x, t):
    inner, size = t["ssm_a"].shape
    rank = t["ssm_dt.weight"].shape[1]
    u, z = np.split(x @ t["ssm_in.weight"].T, 2, axis=1)
    u = silu(convolve(u, t["ssm_conv1d.weight"], t["ssm_conv1d.bias"]))
    state, out = np.zeros((inner, size)), []
    for token in range(len(x)):
        d, b, c = np.split(t["ssm_x.weight"] @ u[token], (rank, rank + size))
        d, b, c = (rms(part, t[f"ssm_{name}_norm.weight"]) for part, name in ((d, "dt"), (b, "b"), (c, "c")))
        delta = np.log1p(np.exp(t["ssm_dt.weight"] @ d + t["ssm_dt.bias"]))
        for channel in range(inner):
            state[channel] *= np.exp(delta[channel] * t["ssm_a"][channel])
            state[channel] += delta[channel] * u[token, channel] * b
        out.append(t["ssm_out.weight"] @ ((state @ c + t["ssm_d"] * u[token]) * silu(z[token])))
    return np.array(out)


def mamba_2(x, t):
    groups, per_group = t["ssm_norm.weight"].shape
    inner, heads = groups * per_group, len(t["ssm_dt.bias"])
    size = (len(t["ssm_conv1d.weight"]) - inner) // (2 * groups)
    z, v, d = np.split(x @ t["ssm_in.weight"].T, (inner, len(t["ssm_in.weight"]) - heads), axis=1)
    v = silu(convolve(v, t["ssm_conv1d.weight"], t["ssm_conv1d.bias"]))
    width, out = inner // heads, []
    states = np.zeros((heads, width, size))
    for token in range(len(x)):
        y = np.empty(inner)
        for head in range(heads):
            group = head * groups // heads
            u = v[token, head * width : (head + 1) * width]
            b = v[token, inner + group * size :][:size]
            c = v[token, inner + (groups + group) * size :][:size]
            delta = math.log1p(math.exp(d[token, head] + t["ssm_dt.bias"][head]))
            states[head] = math.exp(delta * t["ssm_a"][head, 0]) * states[head] + delta * np.outer(u, b)
            y[head * width : (head + 1) * width] = states[head] @ c + t["ssm_d"][head, 0] * u
        y = (y * silu(z[token])).reshape(groups, per_group)
        y = np.concatenate([rms(part, weight) for part, weight in zip(y, t["ssm_norm.weight"], strict=True)])
        out.append(t["ssm_out.weight"] @ y)
    return np.array(out)


def plamo_2(x, t):
    heads, size = len(t["ssm_a"]), len(t["ssm_b_norm.weight"])
    inner = t["ssm_out.weight"].shape[1]
    width, rank = inner // heads, t["ssm_dt.weight"].shape[1]
    both = (x @ t["ssm_in.weight"].T).reshape(len(x), heads, 2 * width)
    z, u = both[:, :, :width].reshape(len(x), inner), both[:, :, width:].reshape(len(x), inner)
    u = silu(convolve(u, t["ssm_conv1d.weight"]))
    states, out = np.zeros((heads, width, size)), []
    for token in range(len(x)):
        mixed = t["ssm_x.weight"] @ u[token]
        b, c = (rms(mixed[i * size :][:size], t[f"ssm_{which}_norm.weight"]) for i, which in enumerate("bc"))
        d = rms(mixed[2 * size :][:rank], t["ssm_dt_norm.weight"])
        delta = np.log1p(np.exp(t["ssm_dt.weight"] @ d + t["ssm_dt.bias"]))
        y = np.empty(inner)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            states[head] = math.exp(delta[head] * t["ssm_a"][head]) * states[head]
            states[head] += delta[head] * np.outer(u[token, part], b)
            y[part] = states[head] @ c + t["ssm_d"][head] * u[token, part]
        out.append(t["ssm_out.weight"] @ (y * silu(z[token])))
    return np.array(out)


def _delta(q, k, v, log_decay, beta, epsilon=1e-5):
    """One head: q and k (T, S), v (T, P), log_decay (T, S), beta (T,)."""
    memory, out = np.zeros((q.shape[1], v.shape[1])), []
    for token in range(len(q)):
        query, key = (one[token] / math.sqrt((one[token] ** 2).sum() + epsilon) for one in (q, k))
        memory *= np.exp(log_decay[token])[:, None]
        memory += np.outer(key, beta[token] * (v[token] - key @ memory))
        out.append(query @ memory / math.sqrt(len(query)))
    return np.array(out)


def delta_net(x, t, *, grouped=False, gate=silu):
    size, heads = len(t["ssm_norm.weight"]), len(t["ssm_a"])
    inner = heads * size
    keys = (len(t["attn_qkv.weight"]) - inner) // 2
    mixed = silu(convolve(x @ t["attn_qkv.weight"].T, t["ssm_conv1d.weight"]))
    z, y = gate(x @ t["attn_gate.weight"].T), np.empty((len(x), inner))
    beta = sigmoid(x @ t["ssm_beta.weight"].T)
    decay = np.log1p(np.exp(x @ t["ssm_alpha.weight"].T + t["ssm_dt.bias"])) * t["ssm_a"]
    for head in range(heads):
        key_heads = keys // size
        key_head = head // (heads // key_heads) if grouped else head % key_heads
        q, k, v = (mixed[:, start : start + size] for start in (
            key_head * size, keys + key_head * size, 2 * keys + head * size
        ))  # fmt: skip
        one = _delta(q, k, v, np.repeat(decay[:, head, None], size, axis=1), beta[:, head])
        y[:, head * size : (head + 1) * size] = [rms(row, t["ssm_norm.weight"]) for row in one]
    return (y * z) @ t["ssm_out.weight"].T


def kimi_delta(x, t, *, floor=None, sign=1, epsilon=1e-5):
    size, heads = len(t["ssm_norm.weight"]), len(t["ssm_a"])
    q, k, v = (silu(convolve(x @ t[f"attn_{part}.weight"].T, t[f"ssm_conv1d_{part}.weight"][:, 0])) for part in "qkv")
    steps = low_rank(x, t, "ssm_f") + t["ssm_dt.bias"]
    beta, y = sigmoid(x @ t["ssm_beta.weight"].T), np.empty((len(x), heads * size))
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        if floor is None:
            decay = np.log1p(np.exp(steps[:, part])) * t["ssm_a"][head]
        else:
            decay = floor * sigmoid(sign * steps[:, part] * t["ssm_a"][head])
        one = _delta(q[:, part], k[:, part], v[:, part], decay, beta[:, head], epsilon)
        y[:, part] = [rms(row, t["ssm_norm.weight"]) for row in one]
    y *= sigmoid(low_rank(x, t, "ssm_g"))
    return y @ t["attn_output.weight"].T


def lightning(x, t):
    """Of the first of two or more layers: the slope of head h of H is 2^(-8 (h + 1) / H), times 1 + 1e-5."""
    inner, heads = len(t["attn_gate.weight"]), 2
    size = inner // heads
    state, out = np.zeros((heads, size, size)), []
    for token in range(len(x)):
        y = []
        for head, (q, k, v) in enumerate(silu(t["attn_qkv.weight"] @ x[token]).reshape(heads, 3, size)):
            slope = 2.0 ** (-8.0 * (head + 1) / heads) * (1.0 + 1e-5)
            state[head] = np.exp(-slope) * state[head] + np.outer(k, v)
            y.append(q @ state[head])
        gate = sigmoid(t["attn_gate.weight"] @ x[token])
        out.append(t["attn_output.weight"] @ (rms(np.concatenate(y), t["attn_norm_2.weight"]) * gate))
    return np.array(out)


def low_rank(x, t, name):
    if f"{name}.weight" in t:
        return x @ t[f"{name}.weight"].T
    y = x @ t[f"{name}_a.weight"].T
    return y @ t[f"{name}_b.weight"].T if f"{name}_b.weight" in t else y


LOOPS = {
    "lfm2": short_conv, "jamba": mamba_1, "mamba2": mamba_2, "falcon-h1": mamba_2, "nemotron_h": mamba_2,
    "qwen35": delta_net, "kimi-linear": kimi_delta, "bailingmoe3": partial(kimi_delta, floor=-5.0), "plamo2": plamo_2,
    "minimax-01": lightning, "kimi-k3": partial(kimi_delta, floor=-5.0, sign=-1),
    "qwen4exp": partial(delta_net, gate=sigmoid),
    "glm5-next": partial(kimi_delta, floor=-5.0, sign=-1, epsilon=1e-6),
}  # fmt: skip
"""The mixer of a family's first layer."""
