"""Tiny models of RWKV for models.py. Heads have 64 columns: llama.cpp's kernels take no fewer."""

import numpy as np

from tests.support.models.naive_model import FFN, VOCAB, File

WIDTH, HEAD = 128, 64
HEADS = WIDTH // HEAD
RANK, DECAY_RANK = 16, 32


def rwkv(arch, **metadata):
    """What files of all versions have: their own width, and no key about attention but its number of heads."""
    own = arch in ("rwkv6", "rwkv7")
    file = File(arch, 3, rms=not own, wkv__head_size=HEAD, token_shift_count=2 if own else 1, **metadata)
    file.meta |= {"embedding_length": WIDTH, "attention.head_count": 0}
    file.meta["attention.head_count_kv"] = 0
    file.tensors.clear()
    file.matrix("token_embd", VOCAB, WIDTH)
    file.matrix("output", VOCAB, WIDTH, gain=3.0)
    norms = ["attn_norm", "attn_norm_2" if own else "ffn_norm"]
    for name in ["output_norm", *(["token_embd_norm"] if own else [])]:
        file.norm(name, WIDTH)
        if own:
            file.add(f"{name}.bias", WIDTH, gain=0.3)
    file.layers(norms=[(name, (WIDTH,)) for name in norms])
    if own:
        file.layers(vectors=[(f"{name}.bias", (WIDTH,)) for name in norms])
        square = [("channel_mix_receptance", (WIDTH, WIDTH))] if arch == "rwkv6" else []
        file.layers(matrices=[("channel_mix_key", (FFN, WIDTH)), ("channel_mix_value", (WIDTH, FFN)), *square])
        for name in ("channel_mix_lerp_k", *(["channel_mix_lerp_r"] if arch == "rwkv6" else [])):
            lerps(file, name, 1, 1, WIDTH)
    else:
        file.layers(matrices=[("ffn_gate", (FFN, WIDTH)), ("ffn_up", (FFN, WIDTH)), ("ffn_down", (WIDTH, FFN))])
    return file


def lerps(file, name, *shape):
    for i in range(file.n_layers):
        file.tensors[f"blk.{i}.{name}.weight"] = file.rng.uniform(0, 1, shape).astype(np.float32)


def version_6(arch="rwkv6", *, kv_heads=HEADS, fused=True, **metadata):
    ranks = {"time_mix_extra_dim": RANK, "time_decay_extra_dim": DECAY_RANK}
    file = rwkv(arch, **ranks, **metadata)
    lerps(file, "time_mix_lerp_x", 1, 1, WIDTH)
    if fused:
        lerps(file, "time_mix_lerp_fused", 5, 1, 1, WIDTH)
    else:
        for letter in "wkvrg":
            lerps(file, f"time_mix_lerp_{letter}", 1, 1, WIDTH)
    square = [(f"time_mix_{name}", (WIDTH, WIDTH)) for name in ("receptance", "gate", "output")]
    keys = [(f"time_mix_{name}", (kv_heads * HEAD, WIDTH)) for name in ("key", "value")]
    low = [("time_mix_w1", (5 * RANK, WIDTH)), ("time_mix_w2", (5, WIDTH, RANK))]
    low += [("time_mix_decay_w1", (DECAY_RANK, WIDTH)), ("time_mix_decay_w2", (WIDTH, DECAY_RANK))]
    file.layers(matrices=square + keys + low, vectors=[("time_mix_decay.weight", (WIDTH,))])
    return file


def rwkv_6(**metadata):
    file = version_6(**metadata)
    vectors = [("time_mix_first.weight", (HEADS, HEAD)), ("time_mix_ln.bias", (WIDTH,))]
    return file.layers(norms=[("time_mix_ln", (WIDTH,))], vectors=vectors)


def rwkv_6_qwen_2():
    file = version_6("rwkv6qwen2", kv_heads=1)
    file.meta["attention.head_count_kv"] = 1
    names = [("key", HEAD), ("value", HEAD), ("receptance", WIDTH)]
    return file.layers(vectors=[(f"time_mix_{name}.bias", (rows,)) for name, rows in names])


def version_7(arch="rwkv7", *, gate=True, norm=True):
    ranks = {"decay": 32, "iclr": 16, "value_residual_mix": 16} | ({"gate": 48} if gate else {})
    file = rwkv(arch, **{f"attention__{name}_lora_rank": rank for name, rank in ranks.items()})
    lerps(file, "time_mix_lerp_fused", 6 if gate else 5, 1, 1, WIDTH)
    square = [(f"time_mix_{name}", (WIDTH, WIDTH)) for name in ("receptance", "key", "value", "output")]
    letters = [("w", 32), ("a", 16), ("v", 16)] + ([("g", 48)] if gate else [])
    low = [(f"time_mix_{letter}1", (rank, WIDTH)) for letter, rank in letters]
    low += [(f"time_mix_{letter}2", (WIDTH, rank)) for letter, rank in letters]
    vectors = [(f"time_mix_{name}.weight", (WIDTH,)) for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")]
    if norm:
        file.layers(norms=[("time_mix_ln", (WIDTH,))], vectors=[("time_mix_ln.bias", (WIDTH,))])
    return file.layers(matrices=square + low, vectors=vectors)


FAMILIES = {
    "arwkv7": lambda: version_7("arwkv7", norm=False),
    "rwkv6": lambda: rwkv_6(rescale_every_n_layers=2),
    "rwkv6qwen2": rwkv_6_qwen_2,
    "rwkv7": version_7,
}
VARIANTS = {
    "rwkv6 of older files": lambda: rwkv_6(fused=False),
    "arwkv7 with norms, without gates": lambda: version_7("arwkv7", gate=False),
}
