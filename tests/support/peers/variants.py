"""Tiny models of families of which the conformance files show only one form: what else their files may say.

See models.py.
"""

import numpy as np

from tests.support.models.feature_models import EXPERT, MOE, USED, expert_tensors
from tests.support.models.naive_model import ATTENTION, FFN, GATED, HEAD, HEADS, KV_HEADS, NORMS, POST, WIDTH, File

HEAD_NORMS = [("attn_q_norm", (HEAD,)), ("attn_k_norm", (HEAD,))]
VALUE = 32
"""Columns of a value where it is wider than its key."""
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 8,
    "rope.dimension_count": HEAD // 2,
}


def experts_behind(file, dense, shared=0, fused=False):
    """Dense parts in the first layers, experts in the others; the choice of experts has a bias."""
    for layer in range(file.n_layers):
        for name, shape in GATED if layer < dense else expert_tensors(shared=shared, fused=fused):
            file.matrix(f"blk.{layer}.{name}", *shape)
        if layer >= dense:
            file.add(f"blk.{layer}.exp_probs_b.bias", MOE["expert_count"], gain=0.5)
    return file


def without_bias(file):
    """The file without biases of the choice of experts."""
    file.tensors = {name: tensor for name, tensor in file.tensors.items() if "exp_probs_b" not in name}
    return file


def llama4(n_experts=8):
    keys = {"expert_count": n_experts, "expert_used_count": USED, "expert_feed_forward_length": EXPERT}
    file = File("llama4", 5, interleave_moe_layer_step=1, **keys)
    file.layers(matrices=ATTENTION, norms=NORMS)
    shapes = dict(expert_tensors(shared=EXPERT))
    for layer in range(5):
        for name, (*count, rows, columns) in shapes.items():
            stack = (n_experts,) if count or name == "ffn_gate_inp" else ()
            shape = (*stack, columns) if name == "ffn_gate_inp" else (*stack, rows, columns)
            file.matrix(f"blk.{layer}.{name}", *shape)
    file.tensors["rope_freqs.weight"] = np.linspace(1, 4, HEAD // 2, dtype=np.float32)
    return file


def afmoe():
    file = File(
        "afmoe", 5, attention__sliding_window=4, leading_dense_block_count=2, expert_shared_count=2,
        expert_weights_norm=True, expert_weights_scale=2.5, **MOE,
    )  # fmt: skip
    gate = [("attn_gate", (HEADS * HEAD, WIDTH))]
    file.layers(matrices=ATTENTION + gate, norms=NORMS + POST + HEAD_NORMS)
    return experts_behind(file, 2, shared=2 * EXPERT)


def laguna(gate_rows, n_layers=5, **metadata):
    file = File(
        "laguna", n_layers, leading_dense_block_count=1, expert_shared_feed_forward_length=FFN,
        expert_weights_norm=True, expert_weights_scale=2.5, **metadata, **MOE,
    )  # fmt: skip
    file.meta |= YARN
    gate = [("attn_gate", (gate_rows, WIDTH))]
    return experts_behind(file.layers(matrices=ATTENTION + gate, norms=NORMS + HEAD_NORMS), 1, shared=FFN)


def mimo2():
    """Layers without a window have other heads, and no sinks."""
    file = File(
        "mimo2", 3, attention__value_scale=0.6, attention__sliding_window=4, rope__freq_base=500000.0,
        rope__freq_base_swa=20000.0, rope__dimension_count=HEAD // 2, **MOE,
    )  # fmt: skip
    file.meta |= {
        "attention.key_length": HEAD, "attention.value_length": VALUE,
        "attention.sliding_window_pattern": np.array([0, 1, 1], bool),
        "attention.head_count": np.array([HEADS, 2 * HEADS, HEADS], np.int32),
        "attention.head_count_kv": np.array([KV_HEADS, HEADS, KV_HEADS], np.int32),
    }  # fmt: skip
    file.layers(norms=NORMS)
    for layer, (heads, kv_heads) in enumerate([(HEADS, KV_HEADS), (2 * HEADS, HEADS), (HEADS, KV_HEADS)]):
        file.matrix(f"blk.{layer}.attn_qkv", heads * HEAD + kv_heads * (HEAD + VALUE), WIDTH)
        file.matrix(f"blk.{layer}.attn_output", WIDTH, heads * VALUE)
        if layer:
            file.add(f"blk.{layer}.attn_sinks.weight", heads)
    return experts_behind(file, 1)


def cohere2moe():
    file = File(
        "cohere2moe", 6, rms=False, attention__sliding_window=4, leading_dense_block_count=1, logit_scale=0.25,
        expert_gating_func=1, expert_weights_norm=False, expert_shared_count=1, **MOE,
    )  # fmt: skip
    file.layers(matrices=ATTENTION, norms=NORMS[:1])
    return without_bias(experts_behind(file, 1, shared=EXPERT))


def smallthinker(**metadata):
    file = File("smallthinker", 5, **metadata, **MOE)
    return without_bias(experts_behind(file.layers(matrices=ATTENTION, norms=NORMS), 0))


def grok():
    """Old numbers, and no dense part beside the experts."""
    file = File("grok", final_logit_softcapping=5.0, **MOE)
    norms = [*NORMS, ("attn_output_norm", (WIDTH,)), ("post_ffw_norm", (WIDTH,))]
    return without_bias(experts_behind(file.layers(matrices=ATTENTION, norms=norms), 0))


def minicpm3():
    nope, rope, rank = 16, 8, 32
    file = File(
        "minicpm3", attention__kv_lora_rank=rank, attention__q_lora_rank=rank, rope__dimension_count=rope,
        attention__key_length=nope + rope, attention__value_length=HEAD, attention__head_count_kv=HEADS,
        rope__scaling__type="longrope", rope__scaling__original_context_length=8,
    )  # fmt: skip
    matrices = [
        ("attn_q_a", (rank, WIDTH)), ("attn_q_b", (HEADS * (nope + rope), rank)),
        ("attn_kv_a_mqa", (rank + rope, WIDTH)), ("attn_kv_b", (HEADS * (nope + HEAD), rank)),
        ("attn_output", (WIDTH, HEADS * HEAD)),
    ]  # fmt: skip
    norms = [*NORMS, ("attn_q_a_norm", (rank,)), ("attn_kv_a_norm", (rank,))]
    file.layers(matrices=matrices + GATED, norms=norms)
    file.meta["context_length"] = 1024
    file.tensors["rope_factors_long.weight"] = np.linspace(1, 9, rope // 2, dtype=np.float32)
    file.tensors["rope_factors_short.weight"] = np.linspace(1, 2, rope // 2, dtype=np.float32)
    return file


VARIANTS = {
    "llama4": llama4,
    "llama4 without norms of queries": lambda: llama4(128),
    "afmoe": afmoe,
    "laguna": lambda: laguna(HEADS, attention__sliding_window=4, rope__dimension_count_swa=HEAD),
    "laguna without windows, gates of values": lambda: laguna(HEADS * HEAD, 2),
    "mimo2": mimo2,
    "cohere2moe": cohere2moe,
    "smallthinker": lambda: smallthinker(expert_gating_func=1),
    "grok": grok,
    "minicpm3": minicpm3,
}
