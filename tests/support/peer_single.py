"""Tiny models of families with one part that no other has, for tests/support/peer_models.py."""

import numpy as np

from tests.support.feature_models import EXPERT, MOE, expert_tensors
from tests.support.naive_model import ATTENTION, FFN, GATED, HEAD, HEADS, NORMS, PLAIN, WIDTH, File

HEAD_NORMS = [("attn_q_norm", (HEAD,)), ("attn_k_norm", (HEAD,))]


XIELU = {"alpha_p": [0.3, 0.9], "alpha_n": [-0.4, 1.2], "beta": [0.5, 0.25], "eps": [-1e-6, -0.1]}


def apertus():
    file = File("apertus")
    file.other = {f"xielu.{key}": np.array(values, np.float32) for key, values in XIELU.items()}
    file.layers(matrices=ATTENTION + PLAIN, norms=NORMS + HEAD_NORMS)
    file.tensors["rope_freqs.weight"] = np.linspace(1, 4, HEAD // 2, dtype=np.float32)
    return file


def bitnet():
    file = File("bitnet")
    file.layers(
        matrices=ATTENTION + GATED, norms=[*NORMS, ("attn_sub_norm", (HEADS * HEAD,)), ("ffn_sub_norm", (FFN,))]
    )
    del file.tensors["output.weight"]
    for i in range(2):
        for name, scale in (("attn_q", 0.7), ("attn_output", 1.3), ("ffn_up", 0.6), ("ffn_down", 1.2)):
            file.tensors[f"blk.{i}.{name}.scale"] = np.array([scale], np.float32)
    return file


def plm():
    rank, turned, value = 32, 8, 12
    file = File("plm", attention__kv_lora_rank=rank, rope__dimension_count=turned)
    file.meta |= {"attention.key_length": HEAD, "attention.value_length": value, "attention.head_count_kv": HEADS}
    kv_rows = HEADS * (HEAD - turned + value)
    matrices = [("attn_q", (HEADS * HEAD, WIDTH)), ("attn_kv_a_mqa", (rank + turned, WIDTH))]
    matrices += [("attn_kv_b", (kv_rows, rank)), ("attn_output", (WIDTH, HEADS * value)), *PLAIN]
    file.layers(matrices=matrices, norms=[*NORMS, ("attn_kv_a_norm", (rank,))])
    del file.tensors["output.weight"]
    return file


def step35():
    """More heads in windowed layers, a gate for each head, and limits in the last layers."""
    windows, layers = np.array([0, 1, 1, 0], bool), 4
    heads = [HEADS, 2 * HEADS, 2 * HEADS, HEADS]
    file = File("step35", layers, **MOE, expert_shared_feed_forward_length=2 * EXPERT)
    file.meta |= {"expert_weights_scale": 1.7, "expert_weights_norm": True, "expert_gating_func": 2}
    file.meta |= {"attention.sliding_window": 4, "attention.sliding_window_pattern": windows}
    file.meta |= {"attention.head_count": np.array(heads, np.int32), "attention.head_count_kv": 2}
    file.meta |= {"attention.key_length": HEAD, "attention.value_length": HEAD, "rope.dimension_count": HEAD}
    file.meta |= {"rope.freq_base": 5e5, "rope.freq_base_swa": 1e4}
    file.meta |= {f"swiglu_clamp_{which}": np.array([0, 0, 0.5, 0.3], np.float32) for which in ("exp", "shexp")}
    file.tensors["rope_freqs.weight"] = np.linspace(1, 3, HEAD // 2, dtype=np.float32)
    file.layers(matrices=ATTENTION[1:3], norms=NORMS + HEAD_NORMS)
    for i, count in enumerate(heads):
        own = [("attn_q", (count * HEAD, WIDTH)), ("attn_output", (WIDTH, count * HEAD)), ("attn_gate", (count, WIDTH))]
        experts = expert_tensors(shared=2 * EXPERT)
        for name, shape in own + (GATED if i == 0 else experts):
            file.matrix(f"blk.{i}.{name}", *shape, gain=1.5)
        if i:
            file.add(f"blk.{i}.exp_probs_b.bias", MOE["expert_count"], gain=0.5)
    return file


FAMILIES = {"apertus": apertus, "bitnet": bitnet, "plm": plm, "step35": step35}
