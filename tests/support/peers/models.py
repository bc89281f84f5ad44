"""Tiny models whose logits llama.cpp has computed: families without another reference, and ways to stretch positions.

scripts/peer_logits.py computes and stores the logits; test_peer_logits.py compares.
"""

import re
from pathlib import Path

import numpy as np

from tests.support.models.feature_models import (
    EXPERT,
    MOE,
    expert_tensors,
    latent,
    learned_positions,
    sinks_and_clamped_gates,
    two_bases,
)
from tests.support.models.indexer_models import blocks
from tests.support.models.naive_model import (
    ATTENTION,
    FFN,
    FUSED,
    GATED,
    HEAD,
    HEADS,
    KV_HEADS,
    NORMS,
    PLAIN,
    QKV,
    TOKENS,
    WIDTH,
    File,
)
from tests.support.models.stream_models import STREAMS
from tests.support.peers import choosers, families, gemma, rwkv, single, variants

HEAD_NORMS = [("attn_q_norm", (HEAD,)), ("attn_k_norm", (HEAD,))]
SECTIONS = np.array([3, 3, 2, 0], np.int32)
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 8}
LOGITS = Path(__file__).parents[1] / "data" / "llama_cpp_logits"
"""A file for each model, and version.txt, which says what made them."""
RUN_CONTEXT = 256
"""What llama.cpp runs with; beyond the original context some families rotate otherwise."""


def logits_file(name):
    """Where the logits of a model are stored, (T, V) float32."""
    return LOGITS / (re.sub("[ ,]+", "-", name) + ".npy")


def tokens_of(file):
    """The tokens that a model reads."""
    return getattr(file, "tokens", TOKENS)


def shown(logits):
    """The logits (T, V) without the columns of tokens that are never given, which hold the least number."""
    return logits[:, (logits != np.finfo(np.float32).min).all(axis=0)]


def written(file, folder):
    """The path of the model's file, with what llama.cpp wants to know beside."""
    file.meta["vocab_size"] = len(file.tensors["token_embd.weight"])
    return file.write(folder, {"tokenizer.ggml.model": "no_vocab"})


def plain(arch, ffn=GATED, norms=NORMS, attention=ATTENTION, **metadata):
    return File(arch, **metadata).layers(matrices=attention + ffn, norms=norms)


def vectors(file, *names):
    """Biases of these tensors, in every layer."""
    shapes = dict([*ATTENTION, *QKV, *GATED, *((name, (WIDTH,)) for name, _ in NORMS)])
    for layer in range(file.n_layers):
        for name in names:
            file.add(f"blk.{layer}.{name}.bias", shapes[name][0], gain=0.3)
    return file


def orion():
    file = vectors(plain("orion", rms=False), "attn_norm", "ffn_norm")
    file.add("output_norm.bias", WIDTH, gain=0.3)
    return file


def starcoder():
    file, _ = learned_positions()
    file.arch = "starcoder"
    return file


def exaone():
    file = plain("exaone")
    file.tensors["rope_freqs.weight"] = np.linspace(1, 4, HEAD // 2, dtype=np.float32)
    return file


def dots1():
    keys = {
        "leading_dense_block_count": 1,
        "expert_shared_count": 2,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
    }
    file = File("dots1", expert_weights_scale=2.5, **keys, **MOE)
    file.meta["attention.head_count_kv"] = HEADS  # llama.cpp takes no other number there
    square = [(name, (HEADS * HEAD, WIDTH)) for name, _ in ATTENTION]
    file.layers(matrices=square, norms=NORMS + HEAD_NORMS)
    for name, shape in GATED:
        file.matrix(f"blk.0.{name}", *shape)
    for name, shape in expert_tensors(shared=2 * EXPERT):
        file.matrix(f"blk.1.{name}", *shape)
    file.add("blk.1.exp_probs_b.bias", MOE["expert_count"], gain=0.5)
    return file


def mixture(arch, shared=0, **metadata):
    keys = {"feed_forward_length": EXPERT} | ({"expert_shared_feed_forward_length": shared} if shared else {})
    norms = NORMS if arch == "granitemoe" else NORMS + HEAD_NORMS
    return plain(arch, ffn=expert_tensors(shared=shared), norms=norms, **keys, **metadata, **MOE)


FAMILIES = {
    **choosers.FAMILIES,
    **families.FAMILIES,
    **choosers.FAMILIES,
    "arcee": lambda: plain("arcee", ffn=PLAIN),
    "chatglm": lambda: vectors(plain("chatglm", ffn=FUSED, attention=QKV, rope__dimension_count=HEAD // 2), "attn_qkv"),
    "codeshell": lambda: plain("codeshell", ffn=PLAIN, attention=QKV, rms=False).biases(),
    "dots1": dots1,
    "exaone": exaone,
    "granitemoe": lambda: mixture(
        "granitemoe", FFN, embedding_scale=6.0, residual_scale=0.3, logit_scale=4.0, attention__scale=0.1
    ),
    "hunyuan-moe": lambda: mixture("hunyuan-moe", FFN, expert_shared_count=1),
    "orion": orion,
    "qwen2vl": lambda: vectors(plain("qwen2vl", rope__dimension_sections=SECTIONS), "attn_q", "attn_k", "attn_v"),
    "qwen3vl": lambda: plain("qwen3vl", norms=NORMS + HEAD_NORMS, rope__dimension_sections=SECTIONS),
    "qwen3vlmoe": lambda: mixture("qwen3vlmoe", rope__dimension_sections=SECTIONS),
    "starcoder": starcoder,
    "xverse": lambda: plain("xverse"),
    **gemma.FAMILIES,
    **rwkv.FAMILIES,
    **single.FAMILIES,
}
"""Families that the conformance files lack."""


def changed(file, **keys):
    file.meta |= {key.replace("__", "."): value for key, value in keys.items()}
    return file


def long_factors(original):
    file = plain("phi3", ffn=FUSED, attention=QKV, rope__scaling__attn_factor=1.19)
    file.tensors["rope_factors_long.weight"] = np.linspace(1, 9, HEAD // 2, dtype=np.float32)
    file.tensors["rope_factors_short.weight"] = np.linspace(1, 2, HEAD // 2, dtype=np.float32)
    scaling = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": original}
    return changed(file, context_length=1024, **scaling)


POSITIONS = {
    "linear": lambda: plain("llama", rope__scaling__type="linear", rope__scaling__factor=4.0),
    "yarn": lambda: changed(plain("qwen2"), **YARN),
    "yarn, its own factor": lambda: changed(plain("llama"), **YARN, rope__scaling__attn_factor=1.3),
    "yarn, all of mistral3": lambda: changed(
        plain("mistral3"),
        **YARN,
        rope__scaling__yarn_beta_fast=4.0,
        rope__scaling__yarn_beta_slow=0.5,
        rope__scaling__yarn_log_multiplier=1.0,
        attention__temperature_scale=0.5,
    ),
    "yarn beside windows, rotated alike": lambda: changed(sinks_and_clamped_gates()[0], **YARN),
    "yarn beside windows, rotated apart": lambda: changed(
        File("olmo2", 4).layers(
            matrices=ATTENTION + GATED,
            norms=[
                ("post_attention_norm", (WIDTH,)),
                ("post_ffw_norm", (WIDTH,)),
                ("attn_q_norm", (HEADS * HEAD,)),
                ("attn_k_norm", (KV_HEADS * HEAD,)),
            ],
        ),
        **YARN,
        attention__sliding_window=4,
        attention__sliding_window_pattern=np.array([1, 1, 1, 0], bool),
    ),
    "linear beside windows": lambda: changed(two_bases()[0], rope__scaling__type="linear", rope__scaling__factor=8.0),
    "yarn of latent attention": lambda: changed(latent(True)[0], **YARN, rope__scaling__yarn_log_multiplier=0.0707),
    "yarn of expanded latent attention": lambda: changed(
        latent(False)[0], **YARN, rope__scaling__yarn_log_multiplier=0.1
    ),
    "long factors": lambda: long_factors(8),
    "short factors": lambda: long_factors(512),
    "part of a head": lambda: plain(
        "gptneox", ffn=PLAIN, attention=QKV, rms=False, rope__dimension_count=4, use_parallel_residual=True
    ).biases(),
}
"""Ways to stretch positions; the conformance files have none."""


def experts_of_unstated_width():
    file = File("qwen2moe", expert_count=MOE["expert_count"], expert_used_count=MOE["expert_used_count"])
    file.layers(matrices=ATTENTION + expert_tensors(shared=FFN), norms=NORMS)
    for layer in range(file.n_layers):
        file.add(f"blk.{layer}.ffn_gate_inp_shexp.weight", WIDTH, gain=0.1)
    return vectors(file, "attn_q", "attn_k", "attn_v")


def layers_that_guess():
    keys = {"leading_dense_block_count": 1, "expert_shared_count": 1, "expert_weights_norm": True} | MOE
    file = File("glm4moe", 3, nextn_predict_layers=1, expert_weights_scale=2.5, rope__dimension_count=HEAD // 2, **keys)
    file.layers(matrices=ATTENTION, norms=[NORMS[0], ("post_attention_norm", (WIDTH,)), *HEAD_NORMS])
    for name, shape in GATED:
        file.matrix(f"blk.0.{name}", *shape)
    for layer in (1, 2):
        for name, shape in expert_tensors(shared=EXPERT):
            file.matrix(f"blk.{layer}.{name}", *shape)
        file.add(f"blk.{layer}.exp_probs_b.bias", MOE["expert_count"], gain=0.5)
    file.matrix("blk.2.nextn.eh_proj", WIDTH, 2 * WIDTH)
    for name in ("enorm", "hnorm"):
        file.norm(f"blk.2.nextn.{name}", WIDTH)
    return vectors(file, "attn_q", "attn_k", "attn_v")


UNSTATED = {
    "experts of unstated width": experts_of_unstated_width,
    "layers that guess, routing unstated": layers_that_guess,
}
"""What files leave out, and what they hold that takes no part."""

MORE = variants.VARIANTS | families.VARIANTS | choosers.CHOOSERS | single.VARIANTS
MODELS = FAMILIES | POSITIONS | UNSTATED | MORE | gemma.VARIANTS | rwkv.VARIANTS

GPU_MODELS = families.FAMILIES | families.VARIANTS | variants.VARIANTS | single.FAMILIES | single.VARIANTS
GPU_MODELS |= gemma.FAMILIES | gemma.VARIANTS | rwkv.FAMILIES | rwkv.VARIANTS | STREAMS
GPU_MODELS |= {name: make for name, make in choosers.CHOOSERS.items() if name.startswith(("deepseek32", "glm-dsa"))}
GPU_MODELS |= choosers.FAMILIES
GPU_MODELS["minimax-m3, three blocks chosen"] = lambda: blocks()[0]
"""Families and forms of families that no conformance file shows, and that GPUs serve."""
