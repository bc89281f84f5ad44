"""Tiny models with recurrent layers, and what they must give: plain loops in float64, from the definitions."""

import numpy as np

from engine.config import PAGE
from engine.gguf.quants import GGMLType, dequantize
from tests.support.models.gguf_builder import MERGES, bpe_tokenizer, build_gguf, pack

_SHARED = [5 + 7 * i % 200 for i in range(2 * PAGE + 20)]
PROMPTS = [_SHARED, [*_SHARED[:100], *range(20, 60)], [*_SHARED, *range(100, 140)], [60, 61, 62], _SHARED[: 2 * PAGE]]
"""Prompts of which some begin alike, or end with a page."""
LAST_BORDERS = [(len(prompt) - 1) // PAGE * PAGE for prompt in PROMPTS]
"""Where later prompts resume them."""


def tiny_mamba_parts(
    *,
    seed=0,
    n_layers=2,
    width=64,
    state=16,
    conv=4,
    dt_rank=5,
    context_length=512,
    norm_dt_b_c=False,
    weight_type=GGMLType.F32,
    selection=4.0,
):
    """Metadata and tensors of a random Mamba 1 whose states remember some tens of tokens.

    selection: size of B and C; with 4 what a layer gives leaves the range of float16 now and then.
    """
    rng = np.random.default_rng(seed)
    inner, vocab = 2 * width, 256 + len(MERGES) + 2
    meta = {
        "general.architecture": "mamba",
        "general.name": "tiny",
        "mamba.block_count": n_layers,
        "mamba.context_length": context_length,
        "mamba.embedding_length": width,
        "mamba.feed_forward_length": 0,
        "mamba.attention.head_count": 0,
        "mamba.attention.layer_norm_rms_epsilon": 1e-5,
        "mamba.ssm.conv_kernel": conv,
        "mamba.ssm.inner_size": inner,
        "mamba.ssm.state_size": state,
        "mamba.ssm.time_step_rank": dt_rank,
        "mamba.ssm.dt_b_c_rms": norm_dt_b_c,
        "mamba.vocab_size": vocab,
    } | bpe_tokenizer(vocab)

    def normal(*shape, gain=1.0):
        return rng.normal(0, gain / np.sqrt(shape[-1]), shape).astype(np.float32)

    def matrix(rows, columns, gain=1.0):
        fits = columns % weight_type.block_size == 0
        return pack(normal(rows, columns, gain=gain), weight_type if fits else GGMLType.F32)

    tensors = {"token_embd.weight": matrix(vocab, width, 3.0)}
    for i in range(n_layers):
        tensors |= {
            f"blk.{i}.attn_norm.weight": rng.uniform(0.5, 1.5, width).astype(np.float32),
            f"blk.{i}.ssm_in.weight": matrix(2 * inner, width, 2.0),
            f"blk.{i}.ssm_conv1d.weight": normal(inner, conv, gain=1.5),
            f"blk.{i}.ssm_conv1d.bias": rng.normal(0, 0.2, inner).astype(np.float32),
            f"blk.{i}.ssm_x.weight": matrix(dt_rank + 2 * state, inner, selection),
            f"blk.{i}.ssm_dt.weight": normal(inner, dt_rank),
            f"blk.{i}.ssm_dt.bias": rng.uniform(-4.0, 0.0, inner).astype(np.float32),
            f"blk.{i}.ssm_a": -rng.uniform(0.05, 2.0, (inner, state)).astype(np.float32),
            f"blk.{i}.ssm_d": rng.uniform(0.5, 1.5, inner).astype(np.float32),
            f"blk.{i}.ssm_out.weight": matrix(width, inner, 2.0),
        }
    tensors["output_norm.weight"] = rng.uniform(0.5, 1.5, width).astype(np.float32)
    return meta, tensors


def tiny_mamba(path, **options):
    """Write the file; returns its path."""
    path.write_bytes(build_gguf(*tiny_mamba_parts(**options)))
    return path


class NaiveMamba:
    """Logits of every token of one sequence, number by number in float64."""

    def __init__(self, meta, tensors):
        self.m = {key.removeprefix("mamba."): value for key, value in meta.items()}
        self.t = {name: self.plain(one) for name, one in tensors.items()}

    @staticmethod
    def plain(tensor):
        if isinstance(tensor, np.ndarray):
            return tensor.astype(np.float64)
        packed, shape, ggml_type = tensor
        return dequantize(packed, ggml_type).reshape(shape).astype(np.float64)

    def rms(self, x, weight=1.0):
        return x / np.sqrt((x * x).mean() + self.m["attention.layer_norm_rms_epsilon"]) * weight

    def logits(self, tokens):
        t, m = self.t, self.m
        inner, size, rank = m["ssm.inner_size"], m["ssm.state_size"], m["ssm.time_step_rank"]
        inputs = [[] for _ in range(m["block_count"])]
        states = [np.zeros((inner, size)) for _ in range(m["block_count"])]
        result = []
        for token in tokens:
            x = t["token_embd.weight"][token]
            for i in range(m["block_count"]):
                p = f"blk.{i}"
                both = t[f"{p}.ssm_in.weight"] @ self.rms(x, t[f"{p}.attn_norm.weight"])
                inputs[i].append(both[:inner])
                u = t[f"{p}.ssm_conv1d.bias"].copy()
                for back, one in enumerate(reversed(inputs[i][-m["ssm.conv_kernel"] :])):
                    u += t[f"{p}.ssm_conv1d.weight"][:, -1 - back] * one
                u = u / (1 + np.exp(-u))
                d, b, c = np.split(t[f"{p}.ssm_x.weight"] @ u, (rank, rank + size))
                if m["ssm.dt_b_c_rms"]:
                    d, b, c = self.rms(d), self.rms(b), self.rms(c)
                delta = np.log1p(np.exp(t[f"{p}.ssm_dt.weight"] @ d + t[f"{p}.ssm_dt.bias"]))
                for channel in range(inner):
                    states[i][channel] *= np.exp(delta[channel] * t[f"{p}.ssm_a"][channel])
                    states[i][channel] += delta[channel] * u[channel] * b
                y = states[i] @ c + t[f"{p}.ssm_d"] * u
                z = both[inner:]
                x = x + t[f"{p}.ssm_out.weight"] @ (y * z / (1 + np.exp(-z)))
            result.append(t["token_embd.weight"] @ self.rms(x, t["output_norm.weight"]))
        return np.array(result)
