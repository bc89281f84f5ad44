"""Tiny models that make embeddings or rank, one of each family and kind, and the texts that llama.cpp has embedded.

scripts/peer_embeddings.py computes and stores llama.cpp's vectors; tests/model/test_peer_embeddings.py compares.
"""

from pathlib import Path

import numpy as np

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
    VOCAB,
    WIDTH,
)
from tests.support.models.naive_model import File as DecoderFile

CONTEXT, WINDOW, EXPERTS = 128, 12, 4
TEXTS = [[5], [7, 30], [(7 * i + i * i // 3) % VOCAB for i in range(17)], [(5 * i + i // 7) % VOCAB for i in range(41)]]
TOKEN_VECTORS_OF = 2
"""Place of the text of which each token's vector is compared, in its first COLUMNS."""

COLUMNS = 16

TARGET = Path(__file__).parents[1] / "data" / "llama_cpp_embeddings.npz"
NAMES = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}

SQUARE = [(f"attn_{name}", (WIDTH, WIDTH)) for name in ("q", "k", "v", "output")]
FUSED_QKV = [("attn_qkv", (3 * WIDTH, WIDTH)), ("attn_output", (WIDTH, WIDTH))]
HEAD_NORMS = [("attn_q_norm", (HEAD,)), ("attn_k_norm", (HEAD,))]


class File(DecoderFile):
    """A file without an output matrix."""

    def __init__(self, arch, n_layers=2, rms=True, pooling="mean", kv_heads=HEADS, norm="output_norm", **metadata):
        keys = {"context_length": CONTEXT, "attention.head_count_kv": kv_heads, "pooling_type": NAMES[pooling]}
        super().__init__(arch, n_layers, rms, **(keys | metadata))
        del self.tensors["output.weight"], self.tensors["output_norm.weight"]
        if norm is not None:
            self.norm(norm, WIDTH)

    def written(self, folder, tokenizer=None):
        """The path of the file, with what llama.cpp wants to know beside."""
        self.meta["vocab_size"] = VOCAB
        kind = {"tokenizer.ggml.model": "no_vocab", "tokenizer.ggml.token_type_count": 2}
        return self.write(folder, kind | (tokenizer or {}))


def bert_like(arch, ffn=PLAIN, attention=SQUARE, positions=False, n_layers=2, **metadata):
    """Norms behind every part, biases everywhere."""
    file = File(arch, n_layers, rms=False, norm=None, attention__causal=False, **metadata)
    file.add("token_types.weight", 2, WIDTH, gain=0.3)
    if positions:
        file.add("position_embd.weight", CONTEXT, WIDTH, gain=0.3)
    norms = [("attn_output_norm", (WIDTH,)), ("layer_output_norm", (WIDTH,))]
    file.norm("token_embd_norm", WIDTH)
    file.layers(matrices=[*attention, *ffn], norms=norms)
    return biased(file)


def biased(file):
    """A bias for every norm and projection but gates, experts and routers."""
    for name in [name for name in file.tensors if name.startswith(("blk.", "token_embd_norm", "cls"))]:
        if not any(part in name for part in ("ffn_gate", "exps", "swiglu")):
            shape = file.tensors[name].shape
            file.add(name.replace("weight", "bias"), shape[-1] if "norm" in name else shape[0], gain=0.3)
    return file


def without_ffn_biases(file):
    file.tensors = {name: value for name, value in file.tensors.items() if not ("ffn_" in name and "bias" in name)}
    return file


def nomic_experts():
    file = bert_like(
        "nomic-bert-moe", ffn=(), moe_every_n_layers=2, expert_count=EXPERTS, expert_used_count=2, n_layers=3
    )
    for layer in (0, 2):
        for name, shape in PLAIN:
            file.matrix(f"blk.{layer}.{name}", *shape)
    file.matrix("blk.1.ffn_gate_inp", EXPERTS, WIDTH)
    file.matrix("blk.1.ffn_up_exps", EXPERTS, FFN, WIDTH)
    file.matrix("blk.1.ffn_down_exps", EXPERTS, WIDTH, FFN)
    return file


def jina_2(ffn, second_norm=False, qk_norm=False):
    file = bert_like("jina-bert-v2", ffn=ffn)
    for layer in range(file.n_layers):
        extra = ["attn_norm_2"] if second_norm else []
        extra += ["attn_q_norm", "attn_k_norm"] if qk_norm else []
        for name in extra:
            file.norm(f"blk.{layer}.{name}", WIDTH)
            file.add(f"blk.{layer}.{name}.bias", WIDTH, gain=0.3)
    return file


def modern_bert(**metadata):
    keys = {"attention.causal": False, "attention.sliding_window": WINDOW, "rope.freq_base": 160000.0}
    file = File("modern-bert", 4, rms=False, **(keys | metadata))
    file.norm("token_embd_norm", WIDTH)
    file.layers(matrices=FUSED_QKV + FUSED, norms=NORMS)
    del file.tensors["blk.0.attn_norm.weight"]
    return file


def neo_bert(**metadata):
    keys = {"attention.causal": False, "rope.scaling.type": "none"}
    return File("neo-bert", norm="enc.output_norm", pooling="cls", **(keys | metadata)).layers(
        matrices=FUSED_QKV + FUSED, norms=NORMS
    )


def eurobert():
    return File("eurobert", attention__causal=False, kv_heads=KV_HEADS).layers(matrices=ATTENTION + GATED, norms=NORMS)


def gemma_embedding(dense=False):
    keys = {"attention.causal": False, "attention.sliding_window": WINDOW, "rope.freq_base": 1000000.0}
    keys |= {"attention.key_length": HEAD, "attention.value_length": HEAD}
    file = File("gemma-embedding", 7, kv_heads=KV_HEADS, **keys)
    post = [("post_attention_norm", (WIDTH,)), ("post_ffw_norm", (WIDTH,))]
    file.layers(matrices=ATTENTION + GATED, norms=NORMS + post + HEAD_NORMS)
    if dense:
        file.meta |= {"dense_2_feat_in": WIDTH, "dense_2_feat_out": FFN}
        file.meta |= {"dense_3_feat_in": FFN, "dense_3_feat_out": WIDTH}
        file.matrix("dense_2", FFN, WIDTH)
        file.matrix("dense_3", WIDTH, FFN)
    return file


def t5(arch="t5encoder", ffn=GATED):
    keys = {"attention.relative_buckets_count": 16, "attention.key_length": HEAD, "attention.value_length": HEAD}
    file = File(arch, norm="enc.output_norm", **keys)
    names = {"attn_output": "attn_o"}
    for layer in range(file.n_layers):
        for name, shape in [*SQUARE, *ffn]:
            file.matrix(f"enc.blk.{layer}.{names.get(name, name)}", *shape)
        for name, shape in NORMS:
            file.norm(f"enc.blk.{layer}.{name}", *shape)
    file.add("enc.blk.0.attn_rel_b.weight", 16, HEADS, gain=1.0)
    return file


def whole_t5():
    """With a decoder of one layer, which takes no part in embeddings."""
    file = t5("t5")
    file.meta |= {"decoder_block_count": 1, "decoder_start_token_id": 0}
    file.norm("dec.output_norm", WIDTH)
    for part in ("attn", "cross_attn"):
        file.norm(f"dec.blk.0.{part}_norm", WIDTH)
        for name in "qkvo":
            file.matrix(f"dec.blk.0.{part}_{name}", WIDTH, WIDTH)
    file.norm("dec.blk.0.ffn_norm", WIDTH)
    for name, shape in GATED:
        file.matrix(f"dec.blk.0.{name}", *shape)
    file.add("dec.blk.0.attn_rel_b.weight", 16, HEADS)
    return file


def ranks(file, cls=True, cls_norm=False, labels=1):
    """With a classification head."""
    file.meta["pooling_type"] = NAMES["rank"]
    if cls:
        file.matrix("cls", WIDTH, WIDTH)
        if not cls_norm:
            file.add("cls.bias", WIDTH, gain=0.3)
    if cls_norm:
        file.norm("cls.norm", WIDTH)
    file.matrix("cls.output", labels, WIDTH)
    file.add("cls.output.bias", labels, gain=0.3)
    if labels > 1:
        file.meta["classifier.output_labels"] = [f"label {i}" for i in range(labels)]
    return file


def qwen3(pooling="last"):
    file = File("qwen3", pooling=pooling, kv_heads=KV_HEADS)
    return file.layers(matrices=ATTENTION + GATED, norms=NORMS + HEAD_NORMS)


def qwen3_reranker():
    file = qwen3("rank")
    file.matrix("cls.output", 2, WIDTH, gain=2.0)
    file.meta["classifier.output_labels"] = ["yes", "no"]
    return file


def llama(arch, pooling="last", **metadata):
    return File(arch, pooling=pooling, kv_heads=KV_HEADS, **metadata).layers(matrices=ATTENTION + GATED, norms=NORMS)


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstu"
WORDPIECE = {
    "tokenizer.ggml.model": "bert",
    "tokenizer.ggml.tokens": [*SPECIAL, *("\u2581" + letter for letter in LETTERS), *LETTERS, "\u2581."],
    "tokenizer.ggml.token_type": np.array([3] * 5 + [1] * 43, np.int32),
    **{
        f"tokenizer.ggml.{name}_token_id": SPECIAL.index(token)
        for name, token in (("padding", "[PAD]"), ("unknown", "[UNK]"), ("bos", "[CLS]"), ("seperator", "[SEP]"))
    },
}
"""A tokenizer of single letters for the tiny models: id 5 is "a" at the beginning of a word, 26 within one."""

MODELS = {
    "bert": lambda: bert_like("bert", positions=True, pooling="cls"),
    "bert, one matrix": lambda: bert_like("bert", attention=FUSED_QKV, positions=True),
    "bert that ranks": lambda: ranks(bert_like("bert", positions=True)),
    "bert with three labels": lambda: ranks(bert_like("bert", positions=True), cls=False, labels=3),
    "nomic-bert": lambda: without_ffn_biases(bert_like("nomic-bert", ffn=GATED, attention=FUSED_QKV)),
    "nomic-bert-moe": nomic_experts,
    "jina-bert-v2": lambda: jina_2(PLAIN),
    "jina-bert-v2, gated": lambda: without_ffn_biases_of_up(jina_2(GATED)),
    "jina-bert-v2, one matrix": lambda: jina_2(FUSED, second_norm=True, qk_norm=True),
    "jina-bert-v3": lambda: bert_like("jina-bert-v3"),
    "modern-bert": modern_bert,
    "modern-bert, silu": lambda: modern_bert(hidden_activation="silu", attention__sliding_window_pattern=2),
    "modern-bert that ranks": lambda: ranks(modern_bert(), cls_norm=True),
    "neo-bert": neo_bert,
    "eurobert": eurobert,
    "gemma-embedding": gemma_embedding,
    "gemma-embedding, dense": lambda: gemma_embedding(dense=True),
    "t5encoder": t5,
    "t5encoder, not gated": lambda: t5(ffn=PLAIN),
    "t5": whole_t5,
    "qwen3": qwen3,
    "qwen3 that ranks": qwen3_reranker,
    "llama": lambda: llama("llama"),
    "llama-embed": lambda: llama("llama-embed", "mean", attention__causal=False),
    "llama, both directions": lambda: llama("llama", "mean", attention__causal=False),
}


def without_ffn_biases_of_up(file):
    """With a gate of its own, up has no bias."""
    file.tensors = {name: value for name, value in file.tensors.items() if "ffn_up.bias" not in name}
    return file
