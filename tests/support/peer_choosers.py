"""Tiny models of which the conformance files do not show what they are about: choices that leave positions out, and
residual connections over several layers.

See peer_models.py.
"""

import numpy as np

from tests.support.feature_models import EXPERT, EXPERTS, MOE, QUERY, expert_tensors
from tests.support.gguf_builder import build_gguf
from tests.support.hybrid_models import tiny_hybrid_parts
from tests.support.indexer_models import INDEX_HEADS, INDEX_WIDTH, TOP_K, add_indexer, tokens
from tests.support.naive_model import GATED, HEADS, WIDTH, File

FIRST_ALONE = np.array([1, 0], np.int32)


class Hybrid:
    """A file of hybrid_models.py, as naive_model.File is used."""

    def __init__(self, family):
        self.family, self.meta = family, {}
        self.metadata, self.tensors = tiny_hybrid_parts(family)

    def write(self, folder, more):
        """Its vocabulary is larger than that of the other models, and so is its tokenizer's."""
        path = folder / f"{self.family}.gguf"
        path.write_bytes(build_gguf(self.metadata, self.tensors))
        return path


def dots3note():
    """Layers 0 and 2 have windows and latent vectors of their own, layer 1 chooses four positions."""
    nope, rope, ranks, values = (16, 24), 16, (32, 48), (16, 32)  # without a window, with one
    file = File(
        "dots3note", 3, leading_dense_block_count=1, expert_shared_count=1, expert_gating_func=2,
        expert_weights_norm=True, expert_weights_scale=2.5, attention__q_lora_rank=QUERY, attention__sliding_window=4,
        rope__freq_base_swa=20000.0, rope__dimension_count=rope, **MOE,
    )  # fmt: skip
    for end, index in (("", 0), ("_swa", 1)):
        file.meta |= {
            f"attention.kv_lora_rank{end}": ranks[index], f"attention.key_length_mla{end}": nope[index] + rope,
            f"attention.value_length_mla{end}": values[index], f"attention.key_length{end}": ranks[index] + rope,
            f"attention.value_length{end}": ranks[index],
        }  # fmt: skip
    file.meta |= {
        "attention.sliding_window_pattern": np.array([1, 0, 1], bool), "attention.head_count_kv": 1,
        "attention.indexer.head_count": INDEX_HEADS, "attention.indexer.key_length": INDEX_WIDTH,
        "attention.indexer.top_k": TOP_K, "attention.indexer.types": np.array([0, 1, 0], np.int32),
    }  # fmt: skip
    for layer, own in enumerate((1, 0, 1)):
        prefix, rank = f"blk.{layer}", ranks[own]
        shapes = {
            "attn_q_a": (QUERY, WIDTH), "attn_q_b": (HEADS * (nope[own] + rope), QUERY), "attn_gate": (HEADS, WIDTH),
            "attn_kv_a_mqa": (rank + rope, WIDTH), "attn_k_b": (HEADS, rank, nope[own]),
            "attn_v_b": (HEADS, values[own], rank), "attn_output": (WIDTH, HEADS * values[own]),
        }  # fmt: skip
        for name, shape in [*shapes.items(), *(expert_tensors(shared=EXPERT) if layer else GATED)]:
            file.matrix(f"{prefix}.{name}", *shape)
        norms = {
            "attn_q_a_norm": QUERY,
            "attn_kv_a_norm": rank,
            "attn_k_norm": rope,
            "attn_norm": WIDTH,
            "ffn_norm": WIDTH,
        }
        for name, width in norms.items():
            file.norm(f"{prefix}.{name}", width)
        if layer:
            file.add(f"{prefix}.exp_probs_b.bias", EXPERTS, gain=0.5)
    return add_indexer(file, 1)


FAMILIES = {"dots3note": dots3note, "glm-dsa": lambda: tokens("glm-dsa")[0]}

CHOOSERS = {
    "deepseek32, four positions chosen": lambda: tokens()[0],
    "glm-dsa, an indexer for both layers": lambda: tokens("glm-dsa", **{"attention.indexer.types": FIRST_ALONE})[0],
    "qwen4exp, three streams and factors of 64 bits": lambda: Hybrid("qwen4exp"),
    "kimi-k3, states banked by every layer": lambda: Hybrid("kimi-k3"),
}
