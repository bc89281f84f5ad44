"""Small random models in variants, written to a file, and their logits in float64, one position after the other."""

import math

import numpy as np

from engine.model.batch import Batch, Outputs
from tests.support.models.gguf_builder import build_gguf, tiny_llama_parts

TOKENS = [3, 250, 17, 17, 99, 201, 4, 260, 33, 8, 120, 77]


class Naive:
    """Logits of a llama-like model, one position after the other, from numbers in float64."""

    def __init__(self, metadata, tensors):
        self.meta = {key.split(".", 1)[1]: value for key, value in metadata.items() if not key.startswith("general")}
        self.arch = metadata["general.architecture"]
        self.tensors = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
        self.heads = self.meta["attention.head_count"]
        self.kv_heads = self.meta.get("attention.head_count_kv", self.heads)

    def project(self, name, x, expert=None):
        weight, scale = self.tensors[name + ".weight"], self.tensors.get(name + ".scale")
        bias = self.tensors.get(name + ".bias")
        y = (weight if expert is None else weight[expert]) @ x
        y = y if scale is None else y * (scale[0] if expert is None else scale[expert])
        if bias is None:
            return y
        # llama.cpp scales the bias of feed-forward projections too
        return y + bias * (scale[0] if scale is not None and ".ffn_" in name else 1.0)

    def norm(self, name, x):
        return (
            x
            / math.sqrt((x * x).mean() + self.meta["attention.layer_norm_rms_epsilon"])
            * self.tensors[name + ".weight"]
        )

    def frequency(self, i, n_rot):
        """Radians per position of pair i, and the factor on cos and sin."""
        f = self.meta.get("rope.freq_base", 10000.0) ** (-2.0 * i / n_rot)
        if "rope_freqs.weight" in self.tensors:
            f /= self.tensors["rope_freqs.weight"][i]
        s = self.meta.get("rope.scaling.factor", 0.0) or 1.0
        if self.meta.get("rope.scaling.type", "linear") == "linear":
            return f / s, 1.0
        original = self.meta["rope.scaling.original_context_length"]

        def dim(turns):
            return n_rot * math.log(original / (2 * math.pi * turns)) / (2 * math.log(self.meta["rope.freq_base"]))

        low, high = max(0, math.floor(dim(32.0))), min(n_rot - 1, math.ceil(dim(1.0)))
        keep = 1.0 - min(1.0, max(0.0, (i - low) / max(0.001, high - low)))
        return keep * f + (1.0 - keep) * f / s, 1.0 + 0.1 * math.log(s)

    def rope(self, head, position):
        n_rot = self.meta.get("rope.dimension_count", len(head))
        out = head.copy()
        for i in range(n_rot // 2):
            a, b = (2 * i, 2 * i + 1) if self.arch in ("llama", "mistral3") else (i, i + n_rot // 2)
            frequency, magnitude = self.frequency(i, n_rot)
            c, s = magnitude * math.cos(position * frequency), magnitude * math.sin(position * frequency)
            out[a], out[b] = head[a] * c - head[b] * s, head[a] * s + head[b] * c
        return out

    def attention(self, prefix, x, position, keys, values):
        width = len(self.tensors[f"{prefix}.attn_q.weight"]) // self.heads
        q = self.project(f"{prefix}.attn_q", x).reshape(self.heads, width)
        k = self.project(f"{prefix}.attn_k", x).reshape(self.kv_heads, width)
        if f"{prefix}.attn_q_norm.weight" in self.tensors:
            q = np.array([self.norm(f"{prefix}.attn_q_norm", head) for head in q])
            k = np.array([self.norm(f"{prefix}.attn_k_norm", head) for head in k])
        keys.append(np.array([self.rope(head, position) for head in k]))
        values.append(self.project(f"{prefix}.attn_v", x).reshape(self.kv_heads, -1))
        sharpen = 1.0
        if self.meta.get("attention.temperature_scale"):
            steps = position // self.meta["rope.scaling.original_context_length"]
            sharpen += self.meta["attention.temperature_scale"] * math.log(1 + steps)
        window = self.meta.get("attention.sliding_window", 0) or 10**9
        out = []
        for h in range(self.heads):
            shared = h * self.kv_heads // self.heads
            query = self.rope(q[h], position) * sharpen
            seen = range(max(0, position - window + 1), position + 1)
            weights = np.exp([query @ keys[j][shared] / math.sqrt(width) for j in seen])
            out.append(sum(w * values[j][shared] for w, j in zip(weights / weights.sum(), seen, strict=True)))
        return self.project(f"{prefix}.attn_output", np.concatenate(out))

    def gated(self, prefix, suffix, x, expert=None):
        gate = self.project(f"{prefix}.ffn_gate{suffix}", x, expert)
        up = self.project(f"{prefix}.ffn_up{suffix}", x, expert)
        return self.project(f"{prefix}.ffn_down{suffix}", gate / (1.0 + np.exp(-gate)) * up, expert)

    def feed_forward(self, prefix, x):
        if not self.meta.get("expert_count"):
            return self.gated(prefix, "", x)
        scores = np.exp(self.project(f"{prefix}.ffn_gate_inp", x))
        scores /= scores.sum()
        best = sorted(range(len(scores)), key=lambda e: -scores[e])[: self.meta["expert_used_count"]]
        total = 1.0 if self.arch == "qwen2moe" else sum(scores[e] for e in best)
        y = sum(scores[e] / total * self.gated(prefix, "_exps", x, e) for e in best)
        if f"{prefix}.ffn_gate_inp_shexp.weight" in self.tensors:
            share = 1.0 / (1.0 + math.exp(-self.tensors[f"{prefix}.ffn_gate_inp_shexp.weight"].ravel() @ x))
            y = y + share * self.gated(prefix, "_shexp", x)
        return y

    def logits(self, tokens):
        cache = [([], []) for _ in range(self.meta["block_count"])]
        rows = []
        for position, token in enumerate(tokens):
            x = self.tensors["token_embd.weight"][token]
            for layer, (keys, values) in enumerate(cache):
                prefix = f"blk.{layer}"
                x = x + self.attention(prefix, self.norm(f"{prefix}.attn_norm", x), position, keys, values)
                x = x + self.feed_forward(prefix, self.norm(f"{prefix}.ffn_norm", x))
            head = "output" if "output.weight" in self.tensors else "token_embd"
            rows.append(self.project(head, self.norm("output_norm", x)))
        return np.array(rows)


def with_biases(tensors):
    rng = np.random.default_rng(5)
    for name in [name for name in tensors if name.startswith("blk") and "norm" not in name]:
        tensors[name.replace("weight", "bias")] = rng.normal(0, 0.3, tensors[name].shape[0]).astype(np.float32)


def with_scales(tensors):
    with_biases(tensors)
    rng = np.random.default_rng(6)
    for name in [name for name in tensors if name.startswith("blk") and name.endswith("weight") and "norm" not in name]:
        tensors[name.replace("weight", "scale")] = rng.uniform(0.5, 2.0, 1).astype(np.float32)
        tensors[name.replace("weight", "input_scale")] = rng.uniform(0.5, 2.0, 1).astype(np.float32)


def with_freqs(tensors):
    tensors["rope_freqs.weight"] = np.linspace(1.0, 8.0, 8).astype(np.float32)


def with_qk_norm(tensors):
    rng = np.random.default_rng(7)
    for i in range(2):
        for which in "qk":
            tensors[f"blk.{i}.attn_{which}_norm.weight"] = rng.uniform(0.5, 2.0, 16).astype(np.float32)


def with_fused_qkv(tensors):
    for i in range(2):
        parts = [tensors.pop(f"blk.{i}.attn_{which}.weight") for which in "qkv"]
        tensors[f"blk.{i}.attn_qkv.weight"] = np.concatenate(parts)


def with_experts(tensors, shared=0):
    rng = np.random.default_rng(8)
    for i in range(2):
        prefix = f"blk.{i}.ffn"
        for name in ("gate", "up", "down"):
            rows, columns = tensors.pop(f"{prefix}_{name}.weight").shape
            shape = (5, rows, columns)
            tensors[f"{prefix}_{name}_exps.weight"] = rng.normal(0, 0.12, shape).astype(np.float32)
            if shared:
                small = (shared, columns) if name != "down" else (rows, shared)
                tensors[f"{prefix}_{name}_shexp.weight"] = rng.normal(0, 0.12, small).astype(np.float32)
        width = tensors[f"{prefix}_norm.weight"].size
        tensors[f"{prefix}_gate_inp.weight"] = rng.normal(0, 0.3, (5, width)).astype(np.float32)
        if shared:
            tensors[f"{prefix}_gate_inp_shexp.weight"] = rng.normal(0, 0.3, width).astype(np.float32)


def with_expert_scales(tensors):
    with_experts(tensors)
    rng = np.random.default_rng(9)
    for name in [name for name in tensors if name.endswith("_exps.weight")]:
        tensors[name.replace("weight", "scale")] = rng.uniform(0.5, 2.0, 5).astype(np.float32)


EXPERTS = {"expert_count": 5, "expert_used_count": 2}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 100,
}
CASES = {
    "grouped heads": {},
    "one kv head": {"kv_heads": 1},
    "as many kv heads": {"kv_heads": 4},
    "separate head": {"tied": False},
    "half-split rope": {"architecture": "qwen2"},
    "partial rope": {"metadata": {"rope.dimension_count": 8}},
    "linear scaling": {"metadata": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}},
    "yarn": {"metadata": YARN},
    "llama 3 frequencies": {"change": with_freqs},
    "sliding window": {"metadata": {"attention.sliding_window": 4}},
    "window of one": {"metadata": {"attention.sliding_window": 1}},
    "biases": {"change": with_biases},
    "scales": {"change": with_scales},
    "wide heads": {"metadata": {"attention.key_length": 16, "attention.value_length": 16}, "heads": 4},
    "temperature": {
        "architecture": "mistral3",
        "metadata": {"attention.temperature_scale": 0.4, "rope.scaling.original_context_length": 3},
    },
    "qk norm": {"architecture": "qwen3", "change": with_qk_norm},
    "experts": {"metadata": EXPERTS, "change": with_experts},
    "expert scales": {"metadata": EXPERTS, "change": with_expert_scales},
    "shared expert": {
        "architecture": "qwen2moe",
        "metadata": EXPERTS | {"expert_feed_forward_length": 96, "expert_shared_feed_forward_length": 24},
        "change": lambda tensors: with_experts(tensors, shared=24),
    },
    "shared expert as wide as two": {
        "architecture": "qwen2moe",
        "metadata": EXPERTS | {"expert_feed_forward_length": 96, "expert_shared_feed_forward_length": 192},
        "change": lambda tensors: with_experts(tensors, shared=192),
    },
}


def make(tmp_path, *, metadata=None, change=None, architecture="llama", **options):
    meta, tensors = tiny_llama_parts(
        tokenizer=False,
        architecture=architecture,
        metadata={f"{architecture}.{key}": value for key, value in (metadata or {}).items()},
        **options,
    )
    if change is not None:
        change(tensors)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"  # a new file: earlier ones may be mapped
    path.write_bytes(build_gguf(meta, tensors))
    return meta, tensors, path


def all_logits(backend, tokens, slot=0):
    return backend.forward(Batch.build([(slot, tokens, 0, Outputs.ALL)]))
