"""A tiny random model of attention over a window and compressed blocks (DeepSeek V4), and its logits in float64."""

import math

import numpy as np

from tests.support.models.naive_model import EPSILON, NORMS, VOCAB, WIDTH, File, sigmoid

HEADS, HEAD, ROTATED, GROUPS, RANK, QUERY = 4, 64, 16, 2, 16, 32
INDEX_HEADS, TOP_K, WINDOW = 8, 3, 6
STREAMS, ITERATIONS, MIX_EPSILON = 4, 3, 1e-3
EXPERTS, USED, EXPERT, LIMIT = 4, 2, 32, 0.6
BASE, BLOCK_BASE, FACTOR, TRAINED = 10000.0, 5000.0, 4.0, 32
RATIOS = (0, 4, 128)
TOKENS = [int(token) for token in np.random.default_rng(4).integers(0, VOCAB, 150)]
"""Enough for a block of 128 positions and for some behind it."""


def compressed():
    """Three layers: a window alone with experts chosen by token, blocks of 4 with an index, blocks of 128."""
    mixes = (2 + STREAMS) * STREAMS
    file = File(
        "deepseek4", n_layers=3, attention__head_count=HEADS, attention__head_count_kv=1, attention__key_length=HEAD,
        attention__value_length=HEAD, attention__q_lora_rank=QUERY, attention__sliding_window=WINDOW,
        attention__output_group_count=GROUPS, attention__output_lora_rank=RANK,
        attention__compress_ratios=np.array([*RATIOS, 0], np.int32),
        attention__compress_rope_freq_base=BLOCK_BASE, attention__indexer__head_count=INDEX_HEADS,
        attention__indexer__key_length=HEAD, attention__indexer__top_k=TOP_K, rope__dimension_count=ROTATED,
        rope__freq_base=BASE, rope__scaling__type="yarn", rope__scaling__factor=FACTOR,
        rope__scaling__original_context_length=TRAINED, hyper_connection__count=STREAMS,
        hyper_connection__sinkhorn_iterations=ITERATIONS, hyper_connection__epsilon=MIX_EPSILON, hash_layer_count=1,
        expert_count=EXPERTS, expert_used_count=USED, expert_feed_forward_length=EXPERT, expert_shared_count=1,
        expert_weights_scale=1.5, expert_weights_norm=True, expert_gating_func=4,
        swiglu_clamp_exp=np.full(3, LIMIT, np.float32), embedding_length_out=STREAMS * WIDTH,
    )  # fmt: skip
    file.meta["context_length"] = 256
    file.tokens = TOKENS
    file.layers(
        matrices=[
            ("attn_q_a", (QUERY, WIDTH)), ("attn_q_b", (HEADS * HEAD, QUERY)), ("attn_kv", (HEAD, WIDTH)),
            ("attn_output_a", (GROUPS * RANK, HEADS * HEAD // GROUPS)), ("attn_output_b", (WIDTH, GROUPS * RANK)),
            ("hc_attn_fn", (mixes, STREAMS * WIDTH)), ("hc_ffn_fn", (mixes, STREAMS * WIDTH)),
            ("ffn_gate_inp", (EXPERTS, WIDTH)),
            *((f"ffn_{which}_exps", (EXPERTS, EXPERT, WIDTH)) for which in ("gate", "up")),
            ("ffn_down_exps", (EXPERTS, WIDTH, EXPERT)),
            *((f"ffn_{which}_shexp", (EXPERT, WIDTH)) for which in ("gate", "up")), ("ffn_down_shexp", (WIDTH, EXPERT)),
        ],
        norms=[*NORMS, ("attn_q_a_norm", (QUERY,)), ("attn_kv_a_norm", (HEAD,))],
        vectors=[
            ("attn_sinks.weight", (HEADS,)),
            *((f"hc_{part}_scale.weight", (3,)) for part in ("attn", "ffn")),
            *((f"hc_{part}_base.weight", (mixes,)) for part in ("attn", "ffn")),
        ],
    )  # fmt: skip
    for layer, ratio in enumerate(RATIOS):
        name = f"blk.{layer}"
        if layer:
            file.add(f"{name}.exp_probs_b.bias", EXPERTS, gain=0.5)
        if ratio:
            block(file, f"{name}.attn_compressor", ratio)
    block(file, "blk.1.indexer_compressor", 4)
    file.matrix("blk.1.indexer.attn_q_b", INDEX_HEADS * HEAD, QUERY)
    file.matrix("blk.1.indexer.proj", INDEX_HEADS, WIDTH)
    chosen = [file.rng.permutation(EXPERTS)[:USED] for _ in range(VOCAB)]
    file.tensors["blk.0.ffn_gate_tid2eid.weight"] = np.array(chosen, np.int32)
    file.matrix("output_hc_fn", STREAMS, STREAMS * WIDTH)
    file.add("output_hc_scale.weight", 1, gain=0.4)
    file.add("output_hc_base.weight", STREAMS, gain=0.4)
    return file


def block(file, name, ratio):
    """The tensors that make keys of blocks of `ratio` positions."""
    rows = HEAD * (2 if ratio == 4 else 1)
    file.matrix(f"{name}_kv", rows, WIDTH)
    file.matrix(f"{name}_gate", rows, WIDTH, gain=2.0)
    file.add(f"{name}_ape.weight", ratio, rows, gain=0.7)
    file.norm(f"{name}_norm", HEAD)


class NaiveCompressed:
    """One position after the other, from the paper."""

    def __init__(self, file):
        self.t = {name: value.astype(np.float64) for name, value in file.tensors.items()}

    def logits(self, tokens):
        """(T, V)."""
        rows = [{"keys": [], "left": [], "index": []} for _ in RATIOS]
        return np.array([self.step(token, position, rows) for position, token in enumerate(tokens)])

    def step(self, token, position, rows):
        x = np.tile(self.t["token_embd.weight"][token], (STREAMS, 1))
        for layer, kept in enumerate(rows):
            name = f"blk.{layer}"
            h, write = self.read(f"{name}.hc_attn", x)
            x = write(self.attention(name, layer, self.norm(f"{name}.attn_norm", h), position, kept))
            h, write = self.read(f"{name}.hc_ffn", x)
            x = write(self.experts(name, self.norm(f"{name}.ffn_norm", h), token))
        u = self.project("output_hc_fn", self.norm(None, x.reshape(-1)))
        gates = sigmoid(u * self.t["output_hc_scale.weight"] + self.t["output_hc_base.weight"]) + MIX_EPSILON
        return self.project("output", self.norm("output_norm", gates @ x))

    def norm(self, name, x):
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
        return x if name is None else x * self.t[f"{name}.weight"]

    def project(self, name, x):
        return self.t[f"{name}.weight"] @ x

    def read(self, name, x):
        """What a part reads of the streams, and what makes of its result the new ones."""
        mixes = self.project(f"{name}_fn", self.norm(None, x.reshape(-1)))
        scale, base = self.t[f"{name}_scale.weight"], self.t[f"{name}_base.weight"]
        read = sigmoid(mixes[:STREAMS] * scale[0] + base[:STREAMS]) + MIX_EPSILON
        write = 2 * sigmoid(mixes[STREAMS : 2 * STREAMS] * scale[1] + base[STREAMS : 2 * STREAMS])
        square = (mixes[2 * STREAMS :] * scale[2] + base[2 * STREAMS :]).reshape(STREAMS, STREAMS)
        square = np.exp(square) / np.exp(square).sum(1, keepdims=True) + MIX_EPSILON
        for iteration in range(ITERATIONS):
            if iteration:
                square = square / (square.sum(1, keepdims=True) + MIX_EPSILON)
            square = square / (square.sum(0, keepdims=True) + MIX_EPSILON)
        return read @ x, lambda given: np.outer(write, given) + square.T @ x

    def turn(self, x, position, layer, back=False):
        """The last numbers of x rotated in pairs of neighbours."""
        out, half = x.copy(), ROTATED // 2
        frequencies = BASE ** (-np.arange(half) / half)
        if RATIOS[layer]:
            frequencies = BLOCK_BASE ** (-np.arange(half) / half)
            at = [ROTATED * math.log(TRAINED / (turns * 2 * math.pi)) / (2 * math.log(BLOCK_BASE)) for turns in (32, 1)]
            low, high = max(0, math.floor(at[0])), min(ROTATED - 1, math.ceil(at[1]))
            kept = 1 - np.clip((np.arange(half) - low) / max(0.001, high - low), 0, 1)
            frequencies = frequencies / FACTOR * (1 - kept) + frequencies * kept
        angles = position * frequencies * (-1 if back else 1)
        first, second = x[..., HEAD - ROTATED :: 2], x[..., HEAD - ROTATED + 1 :: 2]
        out[..., HEAD - ROTATED :: 2] = first * np.cos(angles) - second * np.sin(angles)
        out[..., HEAD - ROTATED + 1 :: 2] = first * np.sin(angles) + second * np.cos(angles)
        return out

    def attention(self, name, layer, x, position, kept):
        latent = self.norm(f"{name}.attn_q_a_norm", self.project(f"{name}.attn_q_a", x))
        q = self.turn(self.norm(None, self.project(f"{name}.attn_q_b", latent).reshape(HEADS, HEAD)), position, layer)
        kept["keys"].append(
            self.turn(self.norm(f"{name}.attn_kv_a_norm", self.project(f"{name}.attn_kv", x)), position, layer)
        )
        keys = kept["keys"][max(0, position + 1 - WINDOW) :]
        if RATIOS[layer]:
            blocks = self.blocks(f"{name}.attn_compressor", layer, x, position, kept["left"])
            if RATIOS[layer] == 4:
                own = self.blocks(f"{name}.indexer_compressor", layer, x, position, kept["index"])
                queries = self.project(f"{name}.indexer.attn_q_b", latent).reshape(INDEX_HEADS, HEAD)
                queries = self.turn(queries, position, layer)
                weights = self.project(f"{name}.indexer.proj", x)
                scores = [weights @ np.maximum(queries @ key, 0) for key in own]
                best = sorted(sorted(range(len(own)), key=lambda j: -scores[j])[:TOP_K])
                blocks = [blocks[j] for j in best]
            keys = keys + blocks
        keys = np.array(keys)
        shares = np.exp(q @ keys.T / math.sqrt(HEAD))
        shares /= shares.sum(1, keepdims=True) + np.exp(self.t[f"{name}.attn_sinks.weight"])[:, None]
        groups = self.turn(shares @ keys, position, layer, back=True).reshape(GROUPS, -1)
        output_a = self.t[f"{name}.attn_output_a.weight"].reshape(GROUPS, RANK, -1)
        return self.project(
            f"{name}.attn_output_b", np.concatenate([a @ g for a, g in zip(output_a, groups, strict=True)])
        )

    def blocks(self, name, layer, x, position, left):
        """Keys of all full blocks; `left` holds values and gates of all positions."""
        ratio = RATIOS[layer]
        gate = self.project(f"{name}_gate", x) + self.t[f"{name}_ape.weight"][position % ratio]
        left.append((self.project(f"{name}_kv", x), gate))
        made = []
        for number in range((position + 1) // ratio):
            own = left[number * ratio : (number + 1) * ratio]
            pairs = [(value[-HEAD:], gate[-HEAD:]) for value, gate in own]
            if ratio == 4 and number:
                before = left[(number - 1) * ratio : number * ratio]
                pairs += [(value[:HEAD], gate[:HEAD]) for value, gate in before]
            values, gates = (np.array(both) for both in zip(*pairs, strict=True))
            pooled = (values * np.exp(gates)).sum(0) / np.exp(gates).sum(0)
            made.append(self.turn(self.norm(f"{name}_norm", pooled), number * ratio, layer))
        return made

    def experts(self, name, x, token):
        scores = np.sqrt(np.log1p(np.exp(self.project(f"{name}.ffn_gate_inp", x))))
        table = self.t.get(f"{name}.ffn_gate_tid2eid.weight")
        if table is None:
            chosen = np.argsort(-(scores + self.t[f"{name}.exp_probs_b.bias"]), kind="stable")[:USED]
        else:
            chosen = table[token].astype(int)
        weights = 1.5 * scores[chosen] / scores[chosen].sum()
        out = self.expert(*(self.t[f"{name}.ffn_{part}_shexp.weight"] for part in ("gate", "up", "down")), x)
        for weight, e in zip(weights, chosen, strict=True):
            parts = (self.t[f"{name}.ffn_{part}_exps.weight"][e] for part in ("gate", "up", "down"))
            out = out + weight * self.expert(*parts, x)
        return out

    def expert(self, gate, up, down, x):
        gated = np.minimum(gate @ x, LIMIT)
        return down @ (gated * sigmoid(gated) * np.clip(up @ x, -LIMIT, LIMIT))
