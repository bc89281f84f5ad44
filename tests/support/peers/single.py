"""Tiny models of families with one part that no other has, for models.py."""

import numpy as np

from tests.support.models.feature_models import EXPERT, MOE, VALUE, expert_tensors, latent
from tests.support.models.indexer_models import tokens
from tests.support.models.naive_model import ATTENTION, FFN, GATED, HEAD, HEADS, NORMS, PLAIN, WIDTH, File

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


def hy_v4(*, choosing):
    """Latent attention with sinks and gates, limits of experts, and several streams; perhaps with an indexer."""
    streams = 3
    stated = {"hyper_connection.count": streams, "hyper_connection.epsilon": 1e-3, "hyper_connection.magnitude": 1.6}
    file = tokens("hy_v4", **stated)[0] if choosing else latent(True)[0]
    file.arch = "hy_v4"
    for key in ("expert_group_count", "expert_group_used_count"):
        del file.meta[key]
    file.meta |= stated | {"swiglu_clamp_exp": np.array([0, 0.5], np.float32)}
    if choosing:
        file.meta["attention.indexer.types"] = np.array([1, 0], np.int32)
        for name in [name for name in file.tensors if name.startswith("blk.1.indexer")]:
            del file.tensors[name]
    else:
        both = file.tensors.pop("blk.1.ffn_gate_up_exps.weight")
        for which, part in zip(("gate", "up"), np.split(both, 2, axis=1), strict=True):
            file.tensors[f"blk.1.ffn_{which}_exps.weight"] = part
    file.layers(matrices=[("attn_gate", (HEADS * VALUE, WIDTH))], vectors=[("attn_sinks.weight", (HEADS,))])
    rows = {f"blk.{i}.hc_{part}": 2 for i in range(2) for part in ("attn", "ffn")} | {"output_hc": 1}
    for name, parts in rows.items():
        file.matrix(f"{name}_fn", parts * streams, streams * WIDTH)
        file.add(f"{name}_base.weight", parts * streams, gain=0.5)
        file.add(f"{name}_scale.weight", parts, gain=0.3, mean=1.0)
    return file


def dots3note():
    """Layers with a window have more heads and other ranks, the others an indexer."""
    windows = np.array([1, 0, 1], bool)
    file = File("dots3note", 3, **MOE, expert_shared_count=2, leading_dense_block_count=1, expert_gating_func=2)
    turned, queries, indexers, index_width = 8, 48, 2, 64
    sizes = {True: (2 * HEADS, 16, 24, 12), False: (HEADS, 32, 16, 16)}  # heads, rank, unrotated part of keys, values
    heads = [sizes[bool(window)][0] for window in windows]
    file.meta |= {"attention.head_count": np.array(heads, np.int32), "attention.head_count_kv": 1}
    file.meta |= {"expert_weights_norm": True, "expert_weights_scale": 2.5, "rope.dimension_count": turned}
    file.meta |= {"attention.sliding_window": 4, "attention.sliding_window_pattern": windows}
    file.meta |= {"rope.freq_base": 5e5, "rope.freq_base_swa": 1e4, "attention.q_lora_rank": queries}
    for end, (_, rank, nope, value) in (("_swa", sizes[True]), ("", sizes[False])):
        file.meta |= {f"attention.key_length_mla{end}": nope + turned, f"attention.value_length_mla{end}": value}
        file.meta |= {f"attention.key_length{end}": rank + turned, f"attention.value_length{end}": rank}
        file.meta[f"attention.kv_lora_rank{end}"] = rank
    file.meta |= {"attention.indexer.head_count": indexers, "attention.indexer.key_length": index_width}
    file.meta |= {"attention.indexer.top_k": 4, "attention.indexer.types": (~windows).astype(np.int32)}
    for i, window in enumerate(windows):
        count, rank, nope, value = sizes[bool(window)]
        matrices = {
            "attn_q_a": (queries, WIDTH), "attn_q_b": (count * (nope + turned), queries),
            "attn_kv_a_mqa": (rank + turned, WIDTH), "attn_k_b": (count, rank, nope), "attn_v_b": (count, value, rank),
            "attn_output": (WIDTH, count * value), "attn_gate": (count, WIDTH),
        }  # fmt: skip
        norms = {"attn_q_a_norm": queries, "attn_kv_a_norm": rank, "attn_k_norm": turned}
        if not window:
            matrices |= {"indexer.attn_q_b": (indexers * index_width, queries), "indexer.attn_k": (index_width, WIDTH)}
            matrices["indexer.proj"] = (indexers, WIDTH)
            norms["indexer.k_norm"] = index_width
            file.add(f"blk.{i}.indexer.k_norm.bias", index_width, gain=0.3)
        for name, shape in [*matrices.items(), *(GATED if i == 0 else expert_tensors(shared=2 * EXPERT))]:
            file.matrix(f"blk.{i}.{name}", *shape, gain=1.5)
        for name, size in norms.items():
            file.norm(f"blk.{i}.{name}", size)
        if i:
            file.add(f"blk.{i}.exp_probs_b.bias", MOE["expert_count"], gain=0.5)
    return file.layers(norms=NORMS)


FAMILIES = {
    "apertus": apertus,
    "bitnet": bitnet,
    "dots3note": dots3note,
    "hy_v4": lambda: hy_v4(choosing=False),
    "plm": plm,
    "step35": step35,
}
VARIANTS = {"hy_v4 with an indexer": lambda: hy_v4(choosing=True)}
