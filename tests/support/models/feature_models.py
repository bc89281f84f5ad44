"""One tiny model for each part that only some families have, with what its papers say about it."""

import math

import numpy as np

from tests.support.models.naive_model import (
    ATTENTION,
    CONTEXT,
    EPSILON,
    FFN,
    FUSED,
    GATED,
    HEAD,
    HEADS,
    KV_HEADS,
    NORMS,
    PLAIN,
    POST,
    QKV,
    WIDTH,
    File,
    Naive,
    gelu,
    sigmoid,
)


def shared_norm():
    file = File("command-r", rms=False, logit_scale=0.25)
    return file.layers(matrices=ATTENTION + GATED, norms=NORMS[:1]), {
        "layer_norm": True, "parallel": True, "ffn_norm": "attn_norm", "rope": "norm", "logit": 0.25,
    }  # fmt: skip


def head_norms():
    file, facts = shared_norm()
    file.layers(norms=[("attn_q_norm", (HEADS, HEAD)), ("attn_k_norm", (KV_HEADS, HEAD))])
    return file, facts


def learned_positions():
    file = File("gpt2", rms=False)
    file.add("position_embd.weight", CONTEXT, WIDTH, gain=0.5)
    facts = {"layer_norm": True, "rope": None, "act": gelu}
    return file.layers(matrices=QKV + PLAIN, norms=NORMS).biases(), facts


def two_norms_in_parallel():
    file = File("gptneox", rms=False, use_parallel_residual=True)
    return file.layers(matrices=QKV + PLAIN, norms=NORMS).biases(), {"layer_norm": True, "parallel": True, "act": gelu}


def one_norm_for_two_parts():
    """GPT-J; biases of the feed-forward part and of the output alone."""
    file = File("gptj", rms=False, rope__dimension_count=HEAD)
    file.layers(matrices=ATTENTION + PLAIN, norms=NORMS[:1])
    for name in [name for name in file.tensors if "norm" in name or ".ffn_" in name or name == "output.weight"]:
        file.add(name.replace("weight", "bias"), len(file.tensors[name]), gain=0.3)
    facts = {"layer_norm": True, "parallel": True, "act": gelu, "rope": "norm", "ffn_norm": "attn_norm"}
    return file, facts


def falcon_40b():
    file = File("falcon", rms=False)
    norms = [("attn_norm", (WIDTH,)), ("attn_norm_2", (WIDTH,))]
    file.layers(matrices=QKV + PLAIN, norms=norms)
    facts = {"layer_norm": True, "parallel": True, "act": gelu, "attn_norm": "attn_norm_2", "ffn_norm": "attn_norm"}
    for name in [name for name in file.tensors if "norm" in name]:
        file.add(name.replace("weight", "bias"), WIDTH, gain=0.3)
    return file, facts


def linear_biases(arch="bloom", **metadata):
    file = File(arch, rms=False, attention__max_alibi_bias=8.0, **metadata)
    if arch == "bloom":
        file.norm("token_embd_norm", WIDTH)
    slopes = np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    facts = {"layer_norm": True, "rope": None, "act": gelu, "slopes": slopes}
    return file.layers(matrices=QKV + PLAIN, norms=NORMS).biases(), facts


def clamped_and_scaled():
    file, facts = linear_biases("mpt", attention__clamp_kqv=0.5)
    for i in range(2):
        file.tensors[f"blk.{i}.ffn.act.scales"] = np.linspace(0.5, 2.0, FFN).astype(np.float32)
    return file, facts | {"clamp": 0.5}


def squared_relu():
    file = File("nemotron", rms=False)
    facts = {"layer_norm": True, "act": lambda x: np.maximum(x, 0) ** 2}
    return file.layers(matrices=ATTENTION + PLAIN, norms=NORMS).biases(), facts


def no_norm_weights():
    file = File("olmo", rms=False, attention__clamp_kqv=0.7)
    del file.tensors["output_norm.weight"]
    return file.layers(matrices=ATTENTION + GATED), {"layer_norm": True, "rope": "norm", "clamp": 0.7}


def norms_behind():
    pattern = np.array([1, 1, 0], bool)
    file = File("olmo2", 3, attention__sliding_window=4, attention__sliding_window_pattern=pattern)
    norms = [*POST, ("attn_q_norm", (HEADS * HEAD,)), ("attn_k_norm", (KV_HEADS * HEAD,))]
    return file.layers(matrices=ATTENTION + GATED, norms=norms), {
        "attn_norm": None, "ffn_norm": None, "post": ("post_attention_norm", "post_ffw_norm"), "windows": [4, 4, None],
    }  # fmt: skip


def sandwich_with_caps():
    file = File("gemma2", 3, attention__sliding_window=3, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)
    return file.layers(matrices=ATTENTION + GATED, norms=NORMS + POST), {
        "act": gelu, "post": ("post_attention_norm", "post_ffw_norm"), "windows": [3, None, 3], "softcap": 2.0,
        "logit_cap": 5.0, "embedding": math.sqrt(WIDTH),
    }  # fmt: skip


def two_bases():
    file = File("gemma3", 7, attention__sliding_window=4, rope__freq_base=100000.0)
    norms = [*NORMS, *POST, ("attn_q_norm", (HEAD,)), ("attn_k_norm", (HEAD,))]
    return file.layers(matrices=ATTENTION + GATED, norms=norms), {
        "act": gelu, "post": ("post_attention_norm", "post_ffw_norm"), "embedding": math.sqrt(WIDTH),
        "windows": [4] * 5 + [None, 4], "bases": [10000.0] * 5 + [100000.0, 10000.0],
    }  # fmt: skip


def unrotated_layers():
    file = File("smollm3", 5)
    return file.layers(matrices=ATTENTION + GATED, norms=NORMS), {
        "rope": "norm", "bases": [10000.0] * 3 + [None, 10000.0],
    }  # fmt: skip


def rotated_where_windowed():
    file = File("cohere2", 4, rms=False, attention__sliding_window=5, logit_scale=0.5)
    return file.layers(matrices=ATTENTION + GATED, norms=NORMS[:1]), {
        "layer_norm": True, "parallel": True, "ffn_norm": "attn_norm", "rope": "norm", "logit": 0.5,
        "windows": [5, 5, 5, None], "bases": [10000.0] * 3 + [None],
    }  # fmt: skip


def norm_after_rotation():
    file = File("hunyuan-dense")
    norms = [*NORMS, ("attn_q_norm", (HEAD,)), ("attn_k_norm", (HEAD,))]
    return file.layers(matrices=ATTENTION + GATED, norms=norms), {"norm_after": True}


def multipliers():
    file = File("granite", embedding_scale=6.0, residual_scale=0.3, logit_scale=4.0, attention__scale=0.1)
    return file.layers(matrices=ATTENTION + GATED, norms=NORMS), {
        "rope": "norm", "embedding": 6.0, "residual": 0.3, "logit": 0.25, "scale": 0.1,
    }  # fmt: skip


def sandwich_fused():
    file = File("glm4")
    facts = {"rope": "norm", "post": ("post_attention_norm", "post_ffw_norm")}
    return file.layers(matrices=ATTENTION + FUSED, norms=NORMS + POST), facts


def second_norm_renamed():
    file = File("seed_oss")
    norms = [NORMS[0], ("post_attention_norm", (WIDTH,))]
    return file.layers(matrices=ATTENTION + GATED, norms=norms), {"ffn_norm": "post_attention_norm"}


EXPERTS, USED, EXPERT = 8, 3, 32


def mixture(naive, p, x, choose, act=lambda g, u: g * sigmoid(g) * u):
    """choose(scores, bias) gives {expert: weight}."""
    t, total = naive.t, np.zeros(WIDTH)

    def expert(name, index, value):
        return t[f"{p}.{name}.weight"][index] @ value + t.get(f"{p}.{name}.bias", np.zeros((EXPERTS, 1)))[index]

    for index, weight in choose(naive.project(f"{p}.ffn_gate_inp", x), t.get(f"{p}.exp_probs_b.bias", 0.0)).items():
        if f"{p}.ffn_gate_up_exps.weight" in t:
            both = expert("ffn_gate_up_exps", index, x)
            gate, up = both[:EXPERT], both[EXPERT:]
        else:
            gate, up = (expert(f"ffn_{which}_exps", index, x) for which in ("gate", "up"))
        total += weight * expert("ffn_down_exps", index, act(gate, up))
    if f"{p}.ffn_up_shexp.weight" in t:
        gate, up = (naive.project(f"{p}.ffn_{which}_shexp", x) for which in ("gate", "up"))
        total += naive.project(f"{p}.ffn_down_shexp", act(gate, up))
    return total


def expert_tensors(shared=0, fused=False):
    gate_up = (
        [("ffn_gate_up_exps", (EXPERTS, 2 * EXPERT, WIDTH))]
        if fused
        else [(f"ffn_{which}_exps", (EXPERTS, EXPERT, WIDTH)) for which in ("gate", "up")]
    )
    shape = {"gate": (shared, WIDTH), "up": (shared, WIDTH), "down": (WIDTH, shared)}
    beside = [(f"ffn_{which}_shexp", shape[which]) for which in shape] if shared else []
    return [("ffn_gate_inp", (EXPERTS, WIDTH)), *gate_up, ("ffn_down_exps", (EXPERTS, WIDTH, EXPERT)), *beside]


MOE = {"expert_count": EXPERTS, "expert_used_count": USED, "expert_feed_forward_length": EXPERT}


def sinks_and_clamped_gates():
    file = File("gpt-oss", 2, attention__sliding_window=4, **MOE)
    norms = [NORMS[0], ("post_attention_norm", (WIDTH,))]
    names = [("ffn_gate_exps", EXPERT), ("ffn_up_exps", EXPERT), ("ffn_down_exps", WIDTH)]
    vectors = [(f"{name}.bias", (EXPERTS, rows)) for name, rows in names]
    vectors += [("ffn_gate_inp.bias", (EXPERTS,)), ("attn_sinks.weight", (HEADS,))]
    vectors += [(f"{name}.bias", shape[:1]) for name, shape in ATTENTION]
    file.layers(matrices=ATTENTION + expert_tensors(), norms=norms, vectors=vectors)
    for i in range(2):  # so that the limits are met
        for which in ("gate", "up"):
            file.tensors[f"blk.{i}.ffn_{which}_exps.weight"] *= 4

    def choose(scores, bias):
        best = np.argsort(-scores)[:USED]
        weights = np.exp(scores[best]) / np.exp(scores[best]).sum()
        return dict(zip(best, weights, strict=True))

    def act(gate, up):
        gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
        return gate * sigmoid(1.702 * gate) * (up + 1)

    return file, {
        "ffn_norm": "post_attention_norm", "windows": [4, None],
        "mixture": lambda naive, p, x: mixture(naive, p, x, choose, act),
    }  # fmt: skip


def sigmoid_routing_in_groups(scores, bias):
    p = sigmoid(scores)
    groups = (p + bias).reshape(4, 2)
    allowed = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(1))[:2]
    choice = [(p + bias)[e] if e // 2 in allowed else -np.inf for e in range(EXPERTS)]
    best = np.argsort(choice)[::-1][:USED]
    return {e: 2.5 * p[e] / p[best].sum() for e in best}


class NaiveChunks(Naive):
    """Llama 4: layers in chunks of positions; every fourth rotates nothing and has queries that grow instead."""

    chunk, scale_of_growth, length = 5, 0.5, 3

    def heads(self, p, x, position, layer):
        q, k, v = super().heads(p, x, position, layer)
        if layer % 4 == 3:
            return q * (1 + self.scale_of_growth * math.log1p((position + 1) // self.length)), k, v
        return *(one / np.sqrt((one**2).mean(-1, keepdims=True) + EPSILON) for one in (q, k)), v

    def attend(self, p, q, keys, values, position, layer):
        self.windows[layer] = None if layer % 4 == 3 else position % self.chunk + 1
        return super().attend(p, q, keys, values, position, layer)


def chunks():
    file = File(
        "llama4", 5, attention__sliding_window=NaiveChunks.chunk, attention__temperature_length=NaiveChunks.length,
        attention__temperature_scale=NaiveChunks.scale_of_growth, interleave_moe_layer_step=2, **MOE,
    )  # fmt: skip
    file.layers(matrices=ATTENTION, norms=NORMS)
    for layer in range(5):
        for name, shape in expert_tensors(shared=EXPERT) if layer % 2 else GATED:
            file.matrix(f"blk.{layer}.{name}", *shape, gain=1.5)

    def part(naive, p, x):
        t, total = naive.t, 0.0
        for which in ("_shexp", "") if f"{p}.ffn_gate_inp.weight" in t else ("",):
            if f"{p}.ffn_up{which}.weight" in t:
                gate, up = (naive.project(f"{p}.ffn_{one}{which}", x) for one in ("gate", "up"))
                total += naive.project(f"{p}.ffn_down{which}", gate * sigmoid(gate) * up)
        scores = naive.project(f"{p}.ffn_gate_inp", x) if f"{p}.ffn_gate_inp.weight" in t else np.array([])
        for index in np.argsort(-scores)[:USED]:
            weighted = sigmoid(scores[index]) * x  # the weight of an expert is on its input
            gate, up = (t[f"{p}.ffn_{one}_exps.weight"][index] @ weighted for one in ("gate", "up"))
            total += t[f"{p}.ffn_down_exps.weight"][index] @ (gate * sigmoid(gate) * up)
        return total

    return file, {"naive": NaiveChunks, "rope": "norm", "bases": [*[10000.0] * 3, None, 10000.0], "mixture": part}


class NaiveChameleon(Naive):
    """Queries and keys have LayerNorms, the stream others; tokens of pictures, from 4 on, are never given."""

    def qk_norm(self, name, heads):
        centered = heads - heads.mean(-1, keepdims=True)
        return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * self.t[f"{name}.weight"]

    def logits(self, tokens):
        rows = super().logits(tokens)
        rows[:, 4:] = np.finfo(np.float32).min
        return rows


def swin_norms():
    """llama.cpp differs: its feed-forward part reads what attention gives without the stream, unlike the model's."""
    file = File("chameleon", swin_norm=True)
    norms = [*NORMS, ("attn_q_norm", (HEADS, HEAD)), ("attn_k_norm", (KV_HEADS, HEAD))]
    return file.layers(matrices=ATTENTION + GATED, norms=norms), {
        "naive": NaiveChameleon, "rope": "norm", "attn_norm": None, "ffn_norm": None, "post": ("attn_norm", "ffn_norm"),
    }  # fmt: skip


LATENT, NOPE, ROPE, VALUE, QUERY = 32, 16, 16, 16, 48


class NaiveLatent(Naive):
    """Latent attention expanded: keys and values of every head, as in the paper; absorbed files hold the same maps."""

    def heads(self, p, x, position, layer):
        q = self.project(f"{p}.attn_q", x) if f"{p}.attn_q.weight" in self.t else None
        if q is None:
            q = self.project(f"{p}.attn_q_b", self.norm(f"{p}.attn_q_a_norm", self.project(f"{p}.attn_q_a", x)))
        q = q.reshape(HEADS, NOPE + ROPE)
        compressed = self.project(f"{p}.attn_kv_a_mqa", x)
        latent = self.norm(f"{p}.attn_kv_a_norm", compressed[:LATENT])
        turned = self.turn(compressed[None, LATENT:], position, 10000.0)
        if f"{p}.attn_kv_b.weight" in self.t:
            both = self.project(f"{p}.attn_kv_b", latent).reshape(HEADS, NOPE + VALUE)
            k, v = both[:, :NOPE], both[:, NOPE:]
        else:
            k = np.einsum("hrn,r->hn", self.t[f"{p}.attn_k_b.weight"], latent)
            v = np.einsum("hvr,r->hv", self.t[f"{p}.attn_v_b.weight"], latent)
        q = np.concatenate([q[:, :NOPE], self.turn(q[:, NOPE:], position, 10000.0)], axis=1)
        return q, np.concatenate([k, np.repeat(turned, HEADS, axis=0)], axis=1), v

    def feed_forward(self, p, x):
        return Naive.feed_forward(self, p, x) if p != "blk.0" else self.dense(p, x)

    def dense(self, p, x):
        gate = self.project(f"{p}.ffn_gate", x)
        return self.project(f"{p}.ffn_down", gate * sigmoid(gate) * self.project(f"{p}.ffn_up", x))


def latent(absorbed, low_rank_queries=True):
    widths = {"attention.key_length": NOPE + ROPE, "attention.value_length": VALUE}
    if absorbed:
        widths = {f"{key}_mla": value for key, value in widths.items()}
        widths |= {"attention.key_length": LATENT + ROPE, "attention.value_length": LATENT}
    file = File(
        "deepseek2", attention__kv_lora_rank=LATENT, rope__dimension_count=ROPE, expert_shared_count=2,
        leading_dense_block_count=1, expert_gating_func=2, expert_weights_norm=True, expert_weights_scale=2.5,
        expert_group_count=4, expert_group_used_count=2, **MOE,
    )  # fmt: skip
    file.meta |= widths | {"attention.head_count_kv": 1 if absorbed else HEADS}
    rows = HEADS * (NOPE + ROPE)
    queries = [("attn_q", (rows, WIDTH))]
    norms = [*NORMS, ("attn_kv_a_norm", (LATENT,))]
    if low_rank_queries:
        file.meta["attention.q_lora_rank"] = QUERY
        queries = [("attn_q_a", (QUERY, WIDTH)), ("attn_q_b", (rows, QUERY))]
        norms.append(("attn_q_a_norm", (QUERY,)))
    kv = [("attn_k_b", (HEADS, LATENT, NOPE)), ("attn_v_b", (HEADS, VALUE, LATENT))]
    if not absorbed:
        kv = [("attn_kv_b", (HEADS * (NOPE + VALUE), LATENT))]
    common = [("attn_kv_a_mqa", (LATENT + ROPE, WIDTH)), ("attn_output", (WIDTH, HEADS * VALUE))]
    file.layers(matrices=queries + kv + common, norms=norms)
    for name, shape in GATED:
        file.matrix(f"blk.0.{name}", *shape)
    for name, shape in expert_tensors(shared=2 * EXPERT, fused=absorbed):
        file.matrix(f"blk.1.{name}", *shape, gain=1.5)
    file.add("blk.1.exp_probs_b.bias", EXPERTS, gain=0.5)
    return file, {
        "rope": "norm", "scale": 1 / math.sqrt(NOPE + ROPE),
        "mixture": lambda naive, p, x: mixture(naive, p, x, sigmoid_routing_in_groups),
    }  # fmt: skip


CASES = [
    shared_norm, head_norms, learned_positions, two_norms_in_parallel, one_norm_for_two_parts, falcon_40b,
    linear_biases, clamped_and_scaled, squared_relu, no_norm_weights, norms_behind, sandwich_with_caps, two_bases,
    unrotated_layers, rotated_where_windowed, norm_after_rotation, multipliers, sandwich_fused, second_norm_renamed,
    sinks_and_clamped_gates,
]  # fmt: skip
CPU_CASES = [chunks, swin_norms]
"""Those that no GPU kernels serve."""
LATENT_CASES = [(True, True), (True, False), (False, True), (False, False)]
