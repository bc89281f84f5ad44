"""Tiny models of Gemma 3n and 4 for models.py: what their layers do beside attention and gates."""

import numpy as np

from tests.support.models.feature_models import EXPERTS, MOE, expert_tensors
from tests.support.models.naive_model import FFN, GATED, HEAD, HEADS, KV_HEADS, NORMS, POST, VOCAB, WIDTH, File

OWN, STREAMS, RANK = 16, 4, 64
SWA_HEAD = 2 * HEAD
"""Columns of a head in windowed layers; others have half as many, and one key head where those have two."""


def calm(file):
    """Norms that keep attention from being sharp and what layers add small: GELU of float16 gives noise to all."""
    for name in file.tensors:
        if name.endswith(("attn_q_norm.weight", "attention_norm.weight", "ffw_norm.weight", "post_norm.weight")):
            file.tensors[name] *= 0.25 if "attn" in name or "attention" in name else 0.05
    return file


def own_vectors(file, width):
    """What gives every layer a vector of each token."""
    file.matrix("per_layer_token_embd", VOCAB, width * file.n_layers, gain=3.0)
    file.matrix("per_layer_model_proj", width * file.n_layers, WIDTH)
    file.norm("per_layer_proj_norm", width)
    matrices = [("inp_gate", (width, WIDTH)), ("proj", (WIDTH, width))]
    file.layers(matrices=matrices, norms=[("post_norm", (WIDTH,))])


def gemma4(windowed, *, shared=0, own=0, experts=False):
    keys = {"head_count_kv": [KV_HEADS if window else 1 for window in windowed], "sliding_window": 4}
    keys |= {"sliding_window_pattern": windowed, "shared_kv_layers": shared}
    keys |= {f"{which}_length": HEAD for which in ("key", "value")}
    keys |= {f"{which}_length_swa": SWA_HEAD for which in ("key", "value")}
    file = File("gemma4", len(windowed), final_logit_softcapping=20.0, embedding_length_per_layer_input=own)
    file.meta |= {
        f"attention.{key}": np.array(value, bool if key.endswith("pattern") else np.int32)
        if isinstance(value, list)
        else value
        for key, value in keys.items()
    }
    file.meta |= {"rope.dimension_count": HEAD, "rope.dimension_count_swa": SWA_HEAD, "rope.freq_base": 1e6}
    del file.tensors["output.weight"]
    file.matrix("token_embd", VOCAB, WIDTH, gain=2.0)
    file.tensors["rope_freqs.weight"] = np.array([1.0] * (HEAD // 8) + [1e30] * (HEAD // 2 - HEAD // 8), np.float32)
    file.layers(norms=NORMS + POST, vectors=[("layer_output_scale.weight", (1,))])
    for i, window in enumerate(windowed):
        head, kv_heads = (SWA_HEAD, KV_HEADS) if window else (HEAD, 1)
        rows = {"attn_q": HEADS * head}
        if i < len(windowed) - shared:
            rows |= {"attn_k": kv_heads * head} | ({"attn_v": kv_heads * head} if window else {})
            file.norm(f"blk.{i}.attn_k_norm", head)
        for name, count in rows.items():
            file.matrix(f"blk.{i}.{name}", count, WIDTH)
        file.matrix(f"blk.{i}.attn_output", WIDTH, HEADS * head)
        file.norm(f"blk.{i}.attn_q_norm", head)
    file.layers(matrices=GATED)
    if own:
        own_vectors(file, own)
    if experts:
        file.meta |= MOE
        file.layers(
            matrices=expert_tensors(fused=True),
            norms=[(name, (WIDTH,)) for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")],
        )
        for i in range(file.n_layers):
            file.norm(f"blk.{i}.ffn_gate_inp", WIDTH)
            file.tensors[f"blk.{i}.ffn_gate_inp.scale"] = file.tensors.pop(f"blk.{i}.ffn_gate_inp.weight")
            file.matrix(f"blk.{i}.ffn_gate_inp", EXPERTS, WIDTH, gain=8.0)
            file.tensors[f"blk.{i}.ffn_down_exps.scale"] = np.linspace(0.5, 1.5, EXPERTS, dtype=np.float32)
    return calm(file)


def small_gemma4():
    """As E2B: parts of twice the width where layers share a cache."""
    file = gemma4([True, False, True, False, True, False], shared=2, own=OWN)
    widths = [FFN] * 4 + [2 * FFN] * 2
    file.meta["feed_forward_length"] = np.array(widths, np.int32)
    for i in (4, 5):
        for name, rows, columns in (("gate", 2 * FFN, WIDTH), ("up", 2 * FFN, WIDTH), ("down", WIDTH, 2 * FFN)):
            file.matrix(f"blk.{i}.ffn_{name}", rows, columns)
    return file


def gemma3n():
    """llama.cpp knows models with 20 layers of their own caches only, and four streams of these ranks."""
    pattern = np.array([i % 5 < 4 for i in range(25)], bool)
    file = File("gemma3n", 25, embedding_length_per_layer_input=256, final_logit_softcapping=30.0)
    file.meta |= {"attention.sliding_window": 4, "attention.sliding_window_pattern": pattern}
    file.meta |= {"attention.shared_kv_layers": 5, "rope.freq_base": 1e6, "altup.num_inputs": STREAMS}
    file.meta |= {"attention.key_length": HEAD, "attention.value_length": HEAD, "feed_forward_length": FFN}
    file.matrix("token_embd", VOCAB, WIDTH, gain=2.0)
    own_vectors(file, 256)
    for name in ("altup_proj", "altup_unembd_proj"):
        file.matrix(name, STREAMS - 1, WIDTH, WIDTH)
    kv_rows = KV_HEADS * HEAD
    matrices = [("attn_q", (HEADS * HEAD, WIDTH)), ("attn_k", (kv_rows, WIDTH)), ("attn_v", (kv_rows, WIDTH))]
    matrices += [("attn_output", (WIDTH, HEADS * HEAD)), *GATED]
    matrices += [("laurel_l", (RANK, WIDTH)), ("laurel_r", (WIDTH, RANK))]
    matrices += [("altup_router", (STREAMS, WIDTH)), ("altup_predict_coef", (STREAMS * STREAMS, STREAMS))]
    norms = [*NORMS, *POST, ("attn_q_norm", (HEAD,)), ("attn_k_norm", (HEAD,))]
    norms += [(name, (WIDTH,)) for name in ("laurel_post_norm", "altup_router_norm", "altup_correct_scale")]
    file.layers(matrices=[*matrices, ("altup_correct_coef", (STREAMS, STREAMS))], norms=norms)
    for i in range(25):
        file.tensors[f"blk.{i}.altup_router.weight"] *= 20.0  # so that what tanh gives counts
        for which in ("predict", "correct"):  # and that 25 layers of it do not
            file.tensors[f"blk.{i}.altup_{which}_coef.weight"] *= 0.1
    return calm(file)


FAMILIES = {
    "gemma3n": gemma3n,
    "gemma4": lambda: gemma4([True, False, True, False]),
}
VARIANTS = {
    "gemma4 with shared caches": small_gemma4,
    "gemma4 with experts": lambda: gemma4([True, False, True], experts=True),
}
