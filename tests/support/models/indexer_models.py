"""Tiny random models whose attention reads the positions that an indexer chooses, and their logits in float64."""

import numpy as np

from tests.support.models.feature_models import (
    EXPERT,
    EXPERTS,
    MOE,
    QUERY,
    NaiveLatent,
    expert_tensors,
    latent,
    mixture,
    sigmoid_routing_in_groups,
)
from tests.support.models.naive_model import ATTENTION, GATED, HEAD, KV_HEADS, NORMS, WIDTH, File, Naive, sigmoid

INDEX_HEADS, INDEX_WIDTH, TOP_K = 16, 64, 4
BLOCK, TOP_BLOCKS = 2, 3


class _Indexed:
    """Positions chosen one token after the other; `chosen` holds those of the token at hand per key/value head."""

    def attention(self, p, x, position, layer, cache):
        if position == 0:
            self.index_keys = getattr(self, "index_keys", {}) | {p: []}
        self.chosen = self.choose(p, x, position)
        return super().attention(p, x, position, layer, cache)

    def seen(self, p, kv_head, position, layer):
        return super().seen(p, kv_head, position, layer) if self.chosen is None else self.chosen[kv_head]

    def turn_first(self, heads, position, style, n_rot):
        """Rotates the first n_rot numbers of heads in a style of their own."""
        own, self.rope = self.rope, style
        turned = np.concatenate([self.turn(heads[:, :n_rot], position, 10000.0), heads[:, n_rot:]], axis=1)
        self.rope = own
        return turned

    @staticmethod
    def best(scores, count):
        return sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:count])


class NaiveTokens(_Indexed, NaiveLatent):
    """DeepSeek 3.2: a score for every position, the same for all heads. `sharing` layers take the last choice."""

    def __init__(self, file, style="neox", sharing=(), **facts):
        super().__init__(file, **facts)
        self.style, self.sharing = style, sharing

    def choose(self, p, x, position):
        if p in self.sharing:
            return self.chosen
        low_rank = self.norm(f"{p}.attn_q_a_norm", self.project(f"{p}.attn_q_a", x))
        q = self.project(f"{p}.indexer.attn_q_b", low_rank).reshape(INDEX_HEADS, INDEX_WIDTH)
        k = self.project(f"{p}.indexer.attn_k", x)
        k = (k - k.mean()) / np.sqrt(k.var() + 1e-6)
        k = k * self.t[f"{p}.indexer.k_norm.weight"] + self.t[f"{p}.indexer.k_norm.bias"]
        n_rot = self.meta["rope.dimension_count"]
        q, k = self.turn_first(q, position, self.style, n_rot), self.turn_first(k[None], position, self.style, n_rot)[0]
        self.index_keys[p].append(k)
        weights = self.project(f"{p}.indexer.proj", x)
        scores = [weights @ np.maximum(q @ key, 0.0) for key in self.index_keys[p]]
        return [self.best(scores, TOP_K)] * 4


class NaiveBlocks(_Indexed, Naive):
    """MiniMax M3: a score for every block and key/value head; the newest block is always chosen."""

    def choose(self, p, x, position):
        if f"{p}.indexer.q_proj.weight" not in self.t:
            return None
        q = self.norm(f"{p}.indexer.q_norm", self.project(f"{p}.indexer.q_proj", x).reshape(KV_HEADS, INDEX_WIDTH))
        k = self.norm(f"{p}.indexer.k_norm", self.project(f"{p}.indexer.k_proj", x))
        q, k = self.turn_first(q, position, "neox", HEAD), self.turn_first(k[None], position, "neox", HEAD)[0]
        self.index_keys[p].append(k)
        chosen = []
        for query in q:
            scores = [query @ key for key in self.index_keys[p]]
            blocks = [max(scores[start : start + BLOCK]) for start in range(0, len(scores), BLOCK)]
            blocks[-1] = np.inf
            of_block = {b * BLOCK + j for b in self.best(blocks, TOP_BLOCKS) for j in range(BLOCK)}
            chosen.append(sorted(j for j in of_block if j <= position))
        return chosen

    def feed_forward(self, p, x):
        return super().feed_forward(p, x) if p == "blk.1" else self.dense(p, x)

    def dense(self, p, x):
        return self.project(f"{p}.ffn_down", clamped(self.project(f"{p}.ffn_gate", x), self.project(f"{p}.ffn_up", x)))


def clamped(gate, up):
    gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    return gate * sigmoid(1.702 * gate) * (up + 1.0)


def tokens(arch="deepseek32", **stated):
    """A file with latent attention and an indexer of single positions in every layer, and what its papers say."""
    file, facts = latent(True)
    file.arch = arch
    file.meta |= {
        "attention.indexer.head_count": INDEX_HEADS, "attention.indexer.key_length": INDEX_WIDTH,
        "attention.indexer.top_k": TOP_K, **stated,
    }  # fmt: skip
    both = file.tensors.pop("blk.1.ffn_gate_up_exps.weight")  # llama.cpp wants them apart
    for which, part in zip(("gate", "up"), np.split(both, 2, axis=1), strict=True):
        file.tensors[f"blk.1.ffn_{which}_exps.weight"] = part
    for i in range(file.n_layers):
        name = f"blk.{i}.indexer"
        file.matrix(f"{name}.attn_q_b", INDEX_HEADS * INDEX_WIDTH, QUERY)
        file.matrix(f"{name}.attn_k", INDEX_WIDTH, WIDTH)
        file.matrix(f"{name}.proj", INDEX_HEADS, WIDTH)
        file.norm(f"{name}.k_norm", INDEX_WIDTH)
        file.add(f"{name}.k_norm.bias", INDEX_WIDTH, gain=0.3)
    return file, facts


def blocks():
    """A file of grouped-query attention with an indexer of blocks in its second layer."""
    file = File(
        "minimax-m3", leading_dense_block_count=1, expert_shared_count=1, expert_gating_func=2,
        expert_weights_norm=True, expert_weights_scale=2.5, attention__indexer__head_count=KV_HEADS,
        attention__indexer__key_length=INDEX_WIDTH, attention__indexer__top_k=TOP_BLOCKS,
        attention__indexer__block_size=BLOCK, attention__indexer__local_blocks=1, expert_group_count=4,
        expert_group_used_count=2, rope__dimension_count=HEAD, attention__key_length=HEAD, **MOE,
    )  # fmt: skip
    file.meta["attention.value_length"] = HEAD
    file.layers(matrices=ATTENTION, norms=[*NORMS, ("attn_q_norm", (HEAD,)), ("attn_k_norm", (HEAD,))])
    for name, shape in GATED:
        file.matrix(f"blk.0.{name}", *shape)
    for name, shape in expert_tensors(shared=EXPERT):
        file.matrix(f"blk.1.{name}", *shape, gain=1.5)
    file.add("blk.1.exp_probs_b.bias", EXPERTS, gain=0.5)
    file.matrix("blk.1.indexer.q_proj", KV_HEADS * INDEX_WIDTH, WIDTH)
    file.matrix("blk.1.indexer.k_proj", INDEX_WIDTH, WIDTH)
    file.norm("blk.1.indexer.q_norm", INDEX_WIDTH)
    file.norm("blk.1.indexer.k_norm", INDEX_WIDTH)
    return file, {
        "mixture": lambda naive, p, x: mixture(naive, p, x, sigmoid_routing_in_groups, clamped),
    }  # fmt: skip
