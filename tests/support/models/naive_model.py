"""Tiny random models for tests, part by part, and their logits in float64, position by position, from the papers."""

import math

import numpy as np

from tests.support.models.gguf_builder import build_gguf

WIDTH, HEADS, KV_HEADS, HEAD, FFN, VOCAB, CONTEXT = 64, 4, 2, 16, 96, 48, 32
TOKENS = [3, 40, 17, 17, 9, 20, 4, 26, 33, 8, 12, 7]
EPSILON = 1e-5


class File:
    """Metadata and random tensors of one architecture, made part by part."""

    def __init__(self, arch, n_layers=2, rms=True, **metadata):
        self.rng = np.random.default_rng(11)
        self.arch, self.n_layers = arch, n_layers
        self.meta = {
            "block_count": n_layers,
            "context_length": CONTEXT,
            "embedding_length": WIDTH,
            "feed_forward_length": FFN,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            f"attention.layer_norm_{'rms_' if rms else ''}epsilon": EPSILON,
        } | {key.replace("__", "."): value for key, value in metadata.items()}
        self.other = {}  # keys without the family's prefix
        self.tensors = {}
        self.matrix("token_embd", VOCAB, WIDTH)
        self.matrix("output", VOCAB, WIDTH, gain=3.0)
        self.norm("output_norm", WIDTH)

    def add(self, name, *shape, gain=1.0, mean=0.0):
        self.tensors[name] = (mean + gain * self.rng.normal(0, 1, shape)).astype(np.float32)

    def matrix(self, name, *shape, gain=1.0):
        self.add(f"{name}.weight", *shape, gain=gain / math.sqrt(shape[-1]))

    def norm(self, name, *shape):
        self.add(f"{name}.weight", *shape, gain=0.3, mean=1.0)

    def layers(self, *, matrices=(), norms=(), vectors=()):
        """In every layer: (name, shape) of matrices, norms and other vectors (these with the full tensor name)."""
        for i in range(self.n_layers):
            for name, shape in matrices:
                self.matrix(f"blk.{i}.{name}", *shape, gain=1.5)
            for name, shape in norms:
                self.norm(f"blk.{i}.{name}", *shape)
            for name, shape in vectors:
                self.add(f"blk.{i}.{name}", *shape, gain=0.4)
        return self

    def biases(self):
        """A bias for every norm and projection there is."""
        for name in [name for name in self.tensors if name.endswith(".weight") and "embd.w" not in name]:
            if name != "output.weight":
                self.add(
                    name.replace("weight", "bias"), self.tensors[name].shape[-1 if "norm" in name else 0], gain=0.3
                )
        return self

    def write(self, folder, more=None):
        path = folder / f"{len(list(folder.iterdir()))}.gguf"
        metadata = {f"{self.arch}.{key}": value for key, value in self.meta.items()} | self.other
        metadata |= more or {}
        path.write_bytes(build_gguf({"general.architecture": self.arch} | metadata, self.tensors))
        return path


ATTENTION = [
    ("attn_q", (HEADS * HEAD, WIDTH)),
    ("attn_k", (KV_HEADS * HEAD, WIDTH)),
    ("attn_v", (KV_HEADS * HEAD, WIDTH)),
    ("attn_output", (WIDTH, HEADS * HEAD)),
]
QKV = [("attn_qkv", ((HEADS + 2 * KV_HEADS) * HEAD, WIDTH)), ATTENTION[3]]
GATED = [("ffn_gate", (FFN, WIDTH)), ("ffn_up", (FFN, WIDTH)), ("ffn_down", (WIDTH, FFN))]
PLAIN = GATED[1:]
FUSED = [("ffn_up", (2 * FFN, WIDTH)), ("ffn_down", (WIDTH, FFN))]
NORMS = [("attn_norm", (WIDTH,)), ("ffn_norm", (WIDTH,))]
POST = [("post_attention_norm", (WIDTH,)), ("post_ffw_norm", (WIDTH,))]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    half = x.astype(np.float16).astype(np.float64)
    return (half / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (half + 0.044715 * half**3)))).astype(np.float16)


class Naive:
    """One position after the other. `facts` are what a family's papers say and its files do not."""

    def __init__(self, file, **facts):
        self.t = {name: value.astype(np.float64) for name, value in file.tensors.items()}
        self.meta, self.n_layers = file.meta, file.n_layers
        self.layer_norm = facts.get("layer_norm", False)
        self.rope = facts.get("rope", "neox")
        self.act = facts.get("act", lambda g: g * sigmoid(g))
        self.parallel = facts.get("parallel", False)
        self.ffn_norm = facts.get("ffn_norm", "ffn_norm")
        self.attn_norm = facts.get("attn_norm", "attn_norm")
        self.post = facts.get("post", (None, None))
        self.embedding = facts.get("embedding", 1.0)
        self.residual = facts.get("residual", 1.0)
        self.logit = facts.get("logit", 1.0)
        self.softcap, self.logit_cap = facts.get("softcap"), facts.get("logit_cap")
        self.windows = facts.get("windows", [None] * self.n_layers)
        self.bases = facts.get("bases", [10000.0] * self.n_layers)
        self.slopes = facts.get("slopes", np.zeros(HEADS))
        self.clamp = facts.get("clamp", np.inf)
        self.norm_after = facts.get("norm_after", False)
        self.mixture = facts.get("mixture")
        self.scale = facts.get("scale", 1 / math.sqrt(HEAD))

    def norm(self, name, x):
        if name is None:
            return x
        x = x - x.mean(-1, keepdims=True) if self.layer_norm else x
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
        return x * self.t.get(f"{name}.weight", 1.0) + self.t.get(f"{name}.bias", 0.0)

    def project(self, name, x):
        return self.t[f"{name}.weight"] @ x + self.t.get(f"{name}.bias", 0.0)

    def turn(self, heads, position, base):
        if base is None or self.rope is None:
            return heads
        out, half = heads.copy(), heads.shape[-1] // 2
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if self.rope == "norm" else (i, i + half)
            angle = position * base ** (-i / half)
            out[:, a] = heads[:, a] * math.cos(angle) - heads[:, b] * math.sin(angle)
            out[:, b] = heads[:, a] * math.sin(angle) + heads[:, b] * math.cos(angle)
        return out

    def qk_norm(self, name, heads):
        weight = self.t.get(f"{name}.weight")
        if weight is None:
            return heads
        whole = weight.ndim == 1 and len(weight) == heads.size  # one norm over all heads together
        return self.norm(name, heads.reshape(-1)).reshape(heads.shape) if whole else self.norm(name, heads)

    def heads(self, p, x, position, layer):
        if f"{p}.attn_qkv.weight" in self.t:
            both = self.project(f"{p}.attn_qkv", x)
        else:
            both = np.concatenate([self.project(f"{p}.attn_{which}", x) for which in "qkv"])
        both = np.clip(both, -self.clamp, self.clamp).reshape(-1, HEAD)
        q, k, v = both[:HEADS], both[HEADS : HEADS + KV_HEADS], both[HEADS + KV_HEADS :]
        base = self.bases[layer]
        for after in (False, True):
            if after == self.norm_after:
                q, k = self.qk_norm(f"{p}.attn_q_norm", q), self.qk_norm(f"{p}.attn_k_norm", k)
            if not after:
                q, k = self.turn(q, position, base), self.turn(k, position, base)
        return q, k, v

    def seen(self, p, kv_head, position, layer):
        """Positions that queries of a key/value head attend to."""
        window = self.windows[layer] or 10**9
        return [j for j in range(position + 1) if j > position - window]

    def attend(self, p, q, keys, values, position, layer):
        out = []
        for h, query in enumerate(q):
            shared = h * len(keys[0]) // len(q)
            seen = self.seen(p, shared, position, layer)
            scores = np.array([self.scale * (query @ keys[j][shared]) for j in seen])
            if self.softcap:
                scores = self.softcap * np.tanh(scores / self.softcap)
            scores = scores - self.slopes[h] * (position - np.array(seen))
            total = np.exp(scores).sum()
            if f"{p}.attn_sinks.weight" in self.t:
                total += np.exp(self.t[f"{p}.attn_sinks.weight"][h])
            out.append(sum(w * values[j][shared] for w, j in zip(np.exp(scores) / total, seen, strict=True)))
        return np.concatenate(out)

    def attention(self, p, x, position, layer, cache):
        q, k, v = self.heads(p, x, position, layer)
        cache[0].append(k)
        cache[1].append(v)
        return self.project(f"{p}.attn_output", self.attend(p, q, *cache, position, layer))

    def feed_forward(self, p, x):
        if self.mixture is not None:
            return self.mixture(self, p, x)
        up = self.project(f"{p}.ffn_up", x)
        if f"{p}.ffn_gate.weight" in self.t:
            h = self.act(self.project(f"{p}.ffn_gate", x)) * up
        elif len(up) == 2 * FFN:
            h = self.act(up[:FFN]) * up[FFN:]
        else:
            h = self.act(up) / self.t.get(f"{p}.ffn.act.scales", 1.0)
        return self.project(f"{p}.ffn_down", h)

    def logits(self, tokens):
        caches, rows = [([], []) for _ in range(self.n_layers)], []
        for position, token in enumerate(tokens):
            x = self.t["token_embd.weight"][token] * self.embedding
            if "position_embd.weight" in self.t:
                x = x + self.t["position_embd.weight"][position]
            if "token_embd_norm.weight" in self.t:
                x = self.norm("token_embd_norm", x)
            for i in range(self.n_layers):
                p = f"blk.{i}"
                named = [name and f"{p}.{name}" for name in (self.attn_norm, self.ffn_norm, *self.post)]
                a = self.attention(p, self.norm(named[0], x), position, i, caches[i])
                y = x + self.residual * self.norm(named[2], a)
                f = self.feed_forward(p, self.norm(named[1], x if self.parallel else y))
                x = y + self.residual * self.norm(named[3], f)
            row = self.project("output", self.norm("output_norm", x)) * self.logit
            rows.append(self.logit_cap * np.tanh(row / self.logit_cap) if self.logit_cap else row)
        return np.array(rows)
