"""Tiny models of families made of parts that others have been measured with, or with one part of their own.

See models.py.
"""

import numpy as np

from tests.support.models.feature_models import EXPERT, MOE, expert_tensors
from tests.support.models.naive_model import (
    ATTENTION,
    FFN,
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
)

HEAD_NORMS = [("attn_q_norm", (HEAD,)), ("attn_k_norm", (HEAD,))]
SQUARE = [(name, (WIDTH, WIDTH)) for name, _ in ATTENTION]
"""A key head for every query head."""
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 8}
WINDOWS = np.array([1, 1, 0, 1], bool)


def plain(arch, ffn=GATED, norms=NORMS, attention=ATTENTION, **metadata):
    return File(arch, **metadata).layers(matrices=attention + ffn, norms=norms)


def biased(file, *names):
    """Biases of these tensors, in every layer."""
    for name, tensor in list(file.tensors.items()):
        if name.startswith("blk.") and name.split(".")[2] in names:
            file.add(name.replace("weight", "bias"), tensor.shape[0], gain=0.3)
    return file


def openelm():
    """Layers differ in their numbers of heads and columns."""
    file = File("openelm")
    heads, kv_heads, widths = [2, 4], [1, 2], [32, FFN]
    file.meta |= {
        "attention.head_count": np.array(heads, np.int32), "attention.head_count_kv": np.array(kv_heads, np.int32),
        "feed_forward_length": np.array(widths, np.int32), "attention.key_length": HEAD, "attention.value_length": HEAD,
    }  # fmt: skip
    for i in range(2):
        file.matrix(f"blk.{i}.attn_qkv", (heads[i] + 2 * kv_heads[i]) * HEAD, WIDTH, gain=1.5)
        file.matrix(f"blk.{i}.attn_output", WIDTH, heads[i] * HEAD)
        for name, shape in (("ffn_gate", (widths[i], WIDTH)), ("ffn_up", (widths[i], WIDTH))):
            file.matrix(f"blk.{i}.{name}", *shape)
        file.matrix(f"blk.{i}.ffn_down", WIDTH, widths[i])
    del file.tensors["output.weight"]
    return file.layers(norms=NORMS + HEAD_NORMS)


def jais(alibi):
    file = File("jais", rms=False, attention__max_alibi_bias=alibi)
    file.meta["attention.head_count_kv"] = HEADS
    return file.layers(matrices=[("attn_qkv", (3 * WIDTH, WIDTH)), SQUARE[3], *GATED], norms=NORMS).biases()


def arctic():
    file = File("arctic", expert_count=MOE["expert_count"], expert_used_count=MOE["expert_used_count"])
    dense = [(f"ffn_{which}", (WIDTH, WIDTH)) for which in ("gate", "up", "down")]
    file.meta["feed_forward_length"] = EXPERT
    norms = [*NORMS, ("ffn_norm_exps", (WIDTH,))]
    return file.layers(matrices=ATTENTION + dense + expert_tensors(), norms=norms)


def mixture(arch, n_layers=4, norms=(), shared=0, **metadata):
    file = File(arch, n_layers, **metadata, **MOE)
    return file.layers(matrices=ATTENTION + expert_tensors(shared=shared), norms=[*NORMS, *norms])


def maple():
    file = mixture("maple", norms=HEAD_NORMS, attention__sliding_window=4, rope__dimension_count_swa=HEAD // 2)
    limits = np.array([0.5, 0.0, 1.0, 0.2], np.float32)
    file.meta |= {"attention.sliding_window_pattern": WINDOWS, "swiglu_clamp_exp": limits}
    return file


def deepseek2_ocr():
    file = File(
        "deepseek2-ocr", leading_dense_block_count=1, expert_shared_count=2, expert_weights_norm=True,
        expert_weights_scale=2.5, **MOE,
    )  # fmt: skip
    file.meta["attention.head_count_kv"] = HEADS
    file.layers(matrices=SQUARE, norms=NORMS)
    for layer, part in enumerate((GATED, expert_tensors(shared=2 * EXPERT, fused=True))):
        for name, shape in part:
            file.matrix(f"blk.{layer}.{name}", *shape)
    return file


def grovemoe():
    """Groups of two experts share a smaller one."""
    file = mixture("grovemoe", 2, HEAD_NORMS, experts_per_group=2, expert_group_scale=0.3)
    file.meta["expert_chunk_feed_forward_length"] = EXPERT // 2
    groups, shapes = MOE["expert_count"] // 2, {"gate": (16, WIDTH), "up": (16, WIDTH), "down": (WIDTH, 16)}
    return file.layers(matrices=[(f"ffn_{which}_chexps", (groups, *shape)) for which, shape in shapes.items()])


def hrm_text():
    """Two stacks of two layers: the low one is passed twice, then the high one, and all of that two times."""
    file = File("hrm_text", 12, hrm__layers_per_stack=2, hrm__l_cycles=2, hrm__h_cycles=2, embedding_scale=3.0)
    file.n_layers = 4
    del file.tensors["output_norm.weight"]
    file.add("hrm.z_l_init", WIDTH)
    return file.layers(matrices=[*ATTENTION, ("attn_gate", (HEADS * HEAD, WIDTH)), *GATED])


def cogvlm():
    file = File("cogvlm")
    file.meta["attention.head_count_kv"] = HEADS
    own = [("attn_qkv", (3 * WIDTH, WIDTH)), SQUARE[3]]
    of_pictures = [(f"vis_{name}", shape) for name, shape in own]
    of_pictures += [(name.replace("ffn", "vis"), shape) for name, shape in GATED]
    return file.layers(matrices=own + GATED + of_pictures, norms=NORMS)


def muse_glimmer():
    file = File("muse-glimmer", 5, attention__sliding_window=4, logit_scale=0.3, final_logit_softcapping=4.0)
    gate = [("attn_gate", (HEADS * HEAD, WIDTH))]
    return file.layers(matrices=ATTENTION + gate + GATED, norms=NORMS + POST + HEAD_NORMS)


def spark2_5():
    file = File("spark2_5", 4, attention__sliding_window=4, rope__dimension_count=HEAD // 2)
    file.meta |= {
        "attention.sliding_window_pattern": WINDOWS, "rope.dimension_count_swa": HEAD, "rope.freq_base_swa": 20000.0,
    }  # fmt: skip
    return file.layers(matrices=[*ATTENTION, ("attn_gate", (HEADS, WIDTH)), *GATED], norms=NORMS)


def talkie():
    file = File("talkie", logit_scale=0.4).layers(matrices=ATTENTION + GATED, norms=[("attn_q_norm", (HEADS, 1))])
    del file.tensors["output_norm.weight"]
    for layer in range(2):
        file.add(f"blk.{layer}.layer_output_scale.weight", 1)
    return file


def chameleon():
    """Tokens 4 to 8195 make pictures."""
    file = File("chameleon")
    for name in ("token_embd", "output"):
        file.matrix(name, 8200, WIDTH, gain=3.0)
    file.layers(
        matrices=ATTENTION + GATED, norms=[*NORMS, ("attn_q_norm", (HEADS, HEAD)), ("attn_k_norm", (KV_HEADS, HEAD))]
    )
    for layer in range(2):
        file.add(f"blk.{layer}.attn_q_norm.bias", HEADS, HEAD, gain=0.3)
    return file


FAMILIES = {
    "arctic": arctic,
    "chameleon": chameleon,
    "cogvlm": cogvlm,
    "deepseek2-ocr": deepseek2_ocr,
    "grovemoe": grovemoe,
    "hrm_text": hrm_text,
    "jais": lambda: jais(8.0),
    "jais2": lambda: plain("jais2", ffn=PLAIN, rms=False).biases(),
    "maincoder": lambda: plain("maincoder", norms=NORMS + HEAD_NORMS),
    "maple": maple,
    "mellum": lambda: changed(mixture("mellum", 5, HEAD_NORMS, attention__sliding_window=4), YARN),
    "muse-glimmer": muse_glimmer,
    "nanbeige": lambda: plain("nanbeige", num_loops=3),
    "openelm": openelm,
    "paddleocr": lambda: plain("paddleocr", rope__dimension_sections=np.array([3, 3, 2, 0], np.int32)),
    "pangu-embedded": lambda: biased(plain("pangu-embedded"), "attn_q", "attn_k", "attn_v", "attn_output"),
    "plamo": lambda: plain("plamo", norms=NORMS[:1]),
    "refact": lambda: biased(plain("refact", attention=QKV), "attn_output"),
    "spark2_5": spark2_5,
    "talkie": talkie,
}  # fmt: skip

VARIANTS = {
    "jais without linear biases": lambda: jais(0.0),
    "nanbeige without norms between": lambda: plain("nanbeige", num_loops=2, skip_loop_final_norm=True),
}


def changed(file, keys):
    file.meta |= keys
    return file
