"""Tiny random models of attention and recurrent layers, and what their recurrent mixers give: loops in float64.

The loops follow the definitions number by number; x (T, D) are normalized inputs of one layer, t its tensors.
"""

import numpy as np

from tests.support.models import rwkv_models
from tests.support.models.gguf_builder import MERGES, bpe_tokenizer, build_gguf

WIDTH, HEADS, HEAD, FFN = 64, 2, 32, 96
INNER, STATE, TAPS, GROUPS, RANK = 128, 16, 4, 2, 32
LATENT = 48
STREAMS, INDEX_WIDTH = 3, 64
MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
SCANNED = {"inner_size": INNER, "conv_kernel": TAPS, "state_size": STATE, "time_step_rank": 4, "group_count": GROUPS}
DELTA = {"inner_size": 4 * STATE, "conv_kernel": TAPS, "state_size": STATE, "time_step_rank": 4, "group_count": GROUPS}

FAMILIES = {
    "lfm2": {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 1]},
    "jamba": {f"ssm.{key}": value for key, value in SCANNED.items() if key != "group_count"}
    | {"attention.head_count_kv": [0, 1], "ssm.time_step_rank": RANK},
    "mamba2": {f"ssm.{key}": value for key, value in SCANNED.items()},
    "falcon-h1": {f"ssm.{key}": value for key, value in SCANNED.items()} | {"attention.head_count_kv": 1},
    "nemotron_h": {f"ssm.{key}": value for key, value in SCANNED.items()}
    | {"attention.head_count_kv": [0, 1, 0], "feed_forward_length": [0, 0, FFN], "block_count": 3},
    "qwen35": {f"ssm.{key}": value for key, value in DELTA.items()}
    | {"attention.head_count_kv": 1, "full_attention_interval": 2, "rope.dimension_sections": [6, 5, 5, 0]},
    "kimi-linear": {
        "kda.head_dim": STATE, "ssm.conv_kernel": TAPS, "attention.head_count_kv": [0, 1], "rope.dimension_count": 16,
        "attention.key_length_mla": 48, "attention.value_length_mla": HEAD, "attention.kv_lora_rank": 32,
        "leading_dense_block_count": 2, "expert_count": 2, "expert_used_count": 1,
    },
    **rwkv_models.FAMILIES,
    "minimax-01": {
        "attention.head_count_kv": 1, "full_attention_interval": 2, "residual_scale": 1.5, "expert_count": 2,
        "expert_used_count": 1,
    },
    "plamo2": {f"ssm.{key}": value for key, value in SCANNED.items() if key != "group_count"}
    | {"attention.head_count_kv": [0, 1]},
}  # fmt: skip
FAMILIES["bailingmoe3"] = FAMILIES["kimi-linear"] | {
    "kda.gate_lower_bound": -5.0,
}
FAMILIES["kimi-k3"] = FAMILIES["bailingmoe3"] | {
    "attn_res.block_size": 1, "activation.situ_beta": 4.0, "activation.situ_linear_beta": 25.0,
    "expert_latent_length": LATENT, "expert_feed_forward_length": FFN, "expert_gating_func": 2,
    "leading_dense_block_count": 1, "expert_shared_count": 1, "expert_weights_norm": True,
    "attention.key_length": 48,
}  # fmt: skip
FAMILIES["glm5-next"] = FAMILIES["bailingmoe3"] | {
    "rope.dimension_count": 0, "attention.key_length_mla": HEAD, "attention.q_lora_rank": LATENT,
    "attention.key_length": 32, "attention.indexer.head_count": 16, "attention.indexer.key_length": INDEX_WIDTH,
    "attention.indexer.top_k": 8, "attention.indexer.kpool": 4, "attention.layer_norm_epsilon": 1e-5,
    "hyper_connection.count": 4, "hyper_connection.epsilon": 1e-3, "hyper_connection.sinkhorn_iterations": 3,
    "swiglu_clamp_exp": np.array([0.0, 0.5], np.float32), "expert_feed_forward_length": FFN,
    "leading_dense_block_count": 1, "expert_shared_count": 1, "expert_weights_norm": True,
}  # fmt: skip
FAMILIES["qwen4exp"] = FAMILIES["qwen35"] | {
    "hyper_connection.count": STREAMS, "hyper_connection.low_rank": 8, "attention.compress_ratios": [4, 4],
    "attention.indexer.head_count": 4, "attention.indexer.key_length": INDEX_WIDTH, "attention.indexer.top_k": 12,
    "expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": FFN, "ple.layers": [0],
    "expert_shared_feed_forward_length": FFN, "ple.ngram_size": 3, "ple.heads_per_ngram": 2, "ple.conv_kernel": TAPS,
    "ple.eos_token_id": 17, "embedding_length_per_layer_input": WIDTH // 4, "ple.layer_multipliers": MULTIPLIERS,
    "ple.head_offsets": np.array([0, 40, 80, 120], np.uint64),
    "ple.head_vocab_sizes": np.array([40, 37, 40, 31], np.uint64),
}  # fmt: skip
"""What the files of each family state beside what all do."""


ROUTED = {"minimax-01": 0, "kimi-k3": 1, "glm5-next": 1, "qwen4exp": 0}
"""Families with experts, and the first layer that has them."""


REUSED = (
    "lfm2", "mamba2", "falcon-h1", "nemotron_h", "jamba", "qwen35", "kimi-linear", "plamo2", "minimax-01", "kimi-k3",
    "qwen4exp", "glm5-next", "rwkv6", "rwkv7",
)  # fmt: skip
"""Families of which every kind of recurrent mixer and of hybrid has one: tests reuse their prefixes."""


def tiny_hybrid_parts(family, *, seed=0, context_length=512):
    """Metadata and tensors of a model of the family; its first layer is recurrent."""
    rng = np.random.default_rng(seed)
    vocab = 256 + len(MERGES) + 2
    shared = {
        "block_count": 2, "context_length": context_length, "embedding_length": WIDTH, "feed_forward_length": FFN,
        "attention.head_count": HEADS, "attention.key_length": HEAD, "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": vocab,
    }  # fmt: skip
    stated = shared | FAMILIES[family]
    stated = {key: np.array(value, np.int32) if isinstance(value, list) else value for key, value in stated.items()}
    meta = {"general.architecture": family, "general.name": "tiny"}
    meta |= {f"{family}.{key}": value for key, value in stated.items()} | bpe_tokenizer(vocab)

    def normal(*shape, gain=1.0):
        return rng.normal(0, gain / np.sqrt(shape[-1]), shape).astype(np.float32)

    def norm(*shape):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)

    tensors = {"token_embd.weight": normal(vocab, WIDTH, gain=3.0)}
    if family in rwkv_models.FAMILIES:
        for i in range(stated["block_count"]):
            layer = rwkv_models.rwkv_layer(family, WIDTH, FFN, rng, normal, norm)
            tensors |= {f"blk.{i}.{name}": tensor for name, tensor in layer.items()}
        names = [f"{name}.{part}" for name in ("token_embd_norm", "output_norm") for part in ("weight", "bias")]
        return meta, tensors | {name: norm(WIDTH) for name in names}
    for i in range(stated["block_count"]):
        dense = family == "nemotron_h" and i == 2
        layer = {"attn_norm.weight": norm(WIDTH)}
        if i == 0 or family in ("falcon-h1", "mamba2"):
            layer |= _recurrent(family, rng, normal, norm)
        if not dense and (family == "falcon-h1" or (i == 1 and family != "mamba2")):
            layer |= _attention(family, normal, norm)
        if i >= ROUTED.get(family, 9):
            layer |= _experts(family, normal, norm)
            layer |= {} if family == "qwen4exp" else {"ffn_norm.weight": norm(WIDTH)}
        elif dense or family not in ("mamba2", "nemotron_h"):
            gated = {} if family in ("nemotron_h", "plamo2") else {"ffn_gate.weight": normal(FFN, WIDTH)}
            up = normal(2 * FFN if family == "plamo2" else FFN, WIDTH)
            layer |= gated | {"ffn_up.weight": up, "ffn_down.weight": normal(WIDTH, FFN)}
            name = "post_attention_norm" if family == "qwen35" else "ffn_norm"
            layer |= {} if dense else {f"{name}.weight": norm(WIDTH)}
            behind = ("post_attention_norm", "post_ffw_norm") if family == "plamo2" else ()
            layer |= {f"{name}.weight": norm(WIDTH) for name in behind}
        if family == "qwen4exp":
            del layer["attn_norm.weight"]
            layer |= _hyper("hc_attn", normal, norm) | _hyper("hc_ffn", normal, norm)
        if family == "glm5-next":
            layer |= _mixed("hc_attn", normal, norm) | _mixed("hc_ffn", normal, norm)
        if family == "kimi-k3":
            layer |= {f"{part}_res_score.weight": normal(WIDTH, gain=4.0) for part in ("attn", "ffn")}
        tensors |= {f"blk.{i}.{name}": tensor for name, tensor in layer.items()}
    if family == "glm5-next":
        tensors["output.weight"] = normal(vocab, WIDTH, gain=3.0)
    if family == "kimi-k3":
        tensors |= {"output.weight": normal(vocab, WIDTH, gain=3.0), "output_res_score.weight": normal(WIDTH, gain=4.0)}
    if family == "qwen4exp":
        tensors |= {name: one for name, one in _hyper("output_hc", normal, norm).items() if "inject" not in name}
        tensors |= {f"blk.0.{name}": one for name, one in _ngrams(normal, norm).items()}
        tensors["per_layer_token_embd.weight"] = normal(160, WIDTH // 4, gain=4.0)
        return meta, tensors
    tensors["token_embd_norm.weight" if family == "lfm2" else "output_norm.weight"] = norm(WIDTH)
    return meta, tensors


def _mixed(name, normal, norm):
    return {
        f"{name}_fn.weight": normal(24, 4 * WIDTH), f"{name}_scale.weight": norm(3), f"{name}_base.weight": normal(24),
    }  # fmt: skip


def _hyper(name, normal, norm):
    wide = STREAMS * WIDTH
    return {
        f"{name}_norm.weight": norm(STREAMS, WIDTH), f"{name}_down.weight": normal(8, wide, gain=2.0),
        f"{name}_up.weight": normal(wide, 8, gain=2.0), f"{name}_inject.weight": normal(STREAMS, wide, gain=2.0),
    }  # fmt: skip


def _ngrams(normal, norm):
    wide = STREAMS * WIDTH
    names = {f"ple_norm_{name}.weight": norm(STREAMS, WIDTH) for name in ("key", "query", "conv")}
    return names | {
        "ple_key.weight": normal(wide, WIDTH), "ple_value.weight": normal(WIDTH, WIDTH),
        "ple_conv1d.weight": normal(wide, TAPS),
    }  # fmt: skip


def _experts(family, normal, norm):
    width = LATENT if family == "kimi-k3" else WIDTH
    tensors = {
        "ffn_gate_inp.weight": normal(2, WIDTH), "ffn_gate_exps.weight": normal(2, FFN, width),
        "ffn_up_exps.weight": normal(2, FFN, width), "ffn_down_exps.weight": normal(2, width, FFN),
    }  # fmt: skip
    if family == "kimi-k3":
        tensors |= {
            "exp_probs_b.bias": norm(2), "ffn_routed_down.weight": normal(width, WIDTH),
            "ffn_routed_norm.weight": norm(width), "ffn_routed_up.weight": normal(WIDTH, width),
            "ffn_gate_shexp.weight": normal(FFN, WIDTH), "ffn_up_shexp.weight": normal(FFN, WIDTH),
            "ffn_down_shexp.weight": normal(WIDTH, FFN),
        }  # fmt: skip
    if family == "glm5-next":
        tensors |= {
            "exp_probs_b.bias": norm(2), "ffn_gate_shexp.weight": normal(FFN, WIDTH),
            "ffn_up_shexp.weight": normal(FFN, WIDTH), "ffn_down_shexp.weight": normal(WIDTH, FFN),
        }  # fmt: skip
    if family == "qwen4exp":
        tensors |= {
            "ffn_gate_inp_shexp.weight": normal(WIDTH), "ffn_gate_shexp.weight": normal(FFN, WIDTH),
            "ffn_up_shexp.weight": normal(FFN, WIDTH), "ffn_down_shexp.weight": normal(WIDTH, FFN),
        }  # fmt: skip
    return tensors


def _attention(family, normal, norm):
    if family in ("kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next"):
        rows = {"bailingmoe3": HEADS, "kimi-k3": HEADS * HEAD}.get(family)
        gate = {} if rows is None else {"attn_gate.weight": normal(rows, WIDTH, gain=2.0)}
        if family == "glm5-next":
            return {
                "attn_q_a.weight": normal(LATENT, WIDTH), "attn_q_a_norm.weight": norm(LATENT),
                "attn_q_b.weight": normal(HEADS * HEAD, LATENT), "attn_kv_a_mqa.weight": normal(32, WIDTH),
                "attn_kv_a_norm.weight": norm(32), "attn_k_b.weight": normal(HEADS, 32, HEAD),
                "attn_v_b.weight": normal(HEADS, HEAD, 32), "attn_output.weight": normal(WIDTH, HEADS * HEAD),
                "indexer.attn_q_b.weight": normal(16 * INDEX_WIDTH, LATENT), "indexer.k_norm.bias": normal(INDEX_WIDTH),
                "indexer.attn_k.weight": normal(INDEX_WIDTH, WIDTH), "indexer.k_norm.weight": norm(INDEX_WIDTH),
                "indexer.proj.weight": normal(16, WIDTH),
                "indexer_compressor_ape.weight": normal(4, INDEX_WIDTH, gain=8.0),
                "indexer_compressor_gate.weight": normal(INDEX_WIDTH, WIDTH, gain=2.0),
            }  # fmt: skip
        return gate | {
            "attn_q.weight": normal(HEADS * 48, WIDTH), "attn_kv_a_mqa.weight": normal(32 + 16, WIDTH),
            "attn_kv_a_norm.weight": norm(32), "attn_k_b.weight": normal(HEADS, 32, 32),
            "attn_v_b.weight": normal(HEADS, HEAD, 32), "attn_output.weight": normal(WIDTH, HEADS * HEAD),
        }  # fmt: skip
    tensors = {
        "attn_q.weight": normal(HEADS * HEAD * (2 if family in ("qwen35", "qwen4exp") else 1), WIDTH),
        "attn_k.weight": normal(HEAD, WIDTH), "attn_v.weight": normal(HEAD, WIDTH),
        "attn_output.weight": normal(WIDTH, HEADS * HEAD),
    }  # fmt: skip
    if family == "plamo2":
        fused = np.concatenate([tensors.pop(f"attn_{part}.weight") for part in "qkv"])
        tensors |= {"attn_qkv.weight": fused, "attn_q_norm.weight": norm(HEADS, HEAD), "attn_k_norm.weight": norm(HEAD)}
    if family == "qwen4exp":
        tensors |= {
            "indexer.q_proj.weight": normal(4 * INDEX_WIDTH, WIDTH), "indexer.q_norm.weight": norm(INDEX_WIDTH),
            "indexer.k_proj.weight": normal(INDEX_WIDTH, WIDTH), "indexer.k_norm.weight": norm(INDEX_WIDTH),
        }  # fmt: skip
    if family in ("lfm2", "qwen35", "qwen4exp"):
        tensors |= {"attn_q_norm.weight": norm(HEAD), "attn_k_norm.weight": norm(HEAD)}
    return tensors


def _recurrent(family, rng, normal, norm):
    """The tensors of a recurrent layer, whose states remember some tens of tokens."""
    heads, convolved = 4, INNER + 2 * GROUPS * STATE
    decays = -rng.uniform(0.05, 2.0, heads).astype(np.float32)
    steps = rng.uniform(-4.0, 0.0, heads).astype(np.float32)
    if family == "lfm2":
        return {
            "shortconv.in_proj.weight": normal(3 * WIDTH, WIDTH, gain=2.0), "shortconv.conv.weight": normal(WIDTH, 3),
            "shortconv.out_proj.weight": normal(WIDTH, WIDTH),
        }  # fmt: skip
    if family == "jamba":
        return {
            "ssm_in.weight": normal(2 * INNER, WIDTH, gain=2.0), "ssm_conv1d.weight": normal(INNER, TAPS, gain=1.5),
            "ssm_conv1d.bias": normal(INNER), "ssm_x.weight": normal(RANK + 2 * STATE, INNER, gain=2.0),
            "ssm_dt.weight": normal(INNER, RANK), "ssm_dt.bias": rng.uniform(-4.0, 0.0, INNER).astype(np.float32),
            "ssm_a": -rng.uniform(0.05, 2.0, (INNER, STATE)).astype(np.float32), "ssm_d": norm(INNER),
            "ssm_out.weight": normal(WIDTH, INNER), "ssm_dt_norm.weight": norm(RANK), "ssm_b_norm.weight": norm(STATE),
            "ssm_c_norm.weight": norm(STATE),
        }  # fmt: skip
    if family in ("qwen35", "qwen4exp"):
        inner, channels = 4 * STATE, 2 * GROUPS * STATE + 4 * STATE
        return {
            "attn_qkv.weight": normal(channels, WIDTH, gain=2.0), "attn_gate.weight": normal(inner, WIDTH, gain=2.0),
            "ssm_beta.weight": normal(heads, WIDTH), "ssm_alpha.weight": normal(heads, WIDTH),
            "ssm_conv1d.weight": normal(channels, TAPS, gain=1.5), "ssm_dt.bias": steps, "ssm_a": decays,
            "ssm_norm.weight": norm(STATE), "ssm_out.weight": normal(WIDTH, inner),
        }  # fmt: skip
    if family == "plamo2":
        return {
            "ssm_in.weight": normal(2 * INNER, WIDTH, gain=2.0), "ssm_conv1d.weight": normal(INNER, TAPS, gain=1.5),
            "ssm_x.weight": normal(2 * STATE + 64, INNER, gain=2.0), "ssm_dt.weight": normal(heads, 64),
            "ssm_dt.bias": steps, "ssm_a": decays, "ssm_d": norm(heads), "ssm_out.weight": normal(WIDTH, INNER),
            "ssm_dt_norm.weight": norm(64), "ssm_b_norm.weight": norm(STATE), "ssm_c_norm.weight": norm(STATE),
        }  # fmt: skip
    if family in ("kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next"):
        inner = HEADS * STATE
        tensors = {f"attn_{part}.weight": normal(inner, WIDTH, gain=2.0) for part in "qkv"}
        tensors |= {f"ssm_conv1d_{part}.weight": normal(inner, 1, TAPS, gain=1.5) for part in "qkv"}
        for which in "fg":  # through few numbers, or at once
            low_rank = {f"ssm_{which}_a.weight": normal(STATE, WIDTH), f"ssm_{which}_b.weight": normal(inner, STATE)}
            whole = {f"ssm_{which}{'' if family == 'kimi-k3' else '_a'}.weight": normal(inner, WIDTH)}
            tensors |= whole if family == "bailingmoe3" or (family == "kimi-k3" and which == "g") else low_rank
        rates = decays[:HEADS] if family in ("kimi-k3", "glm5-next") else decays[:HEADS, None]
        return tensors | {
            "ssm_beta.weight": normal(HEADS, WIDTH), "ssm_dt.bias": rng.uniform(-4.0, 0.0, inner).astype(np.float32),
            "ssm_a": rates, "ssm_norm.weight": norm(STATE), "attn_output.weight": normal(WIDTH, inner),
        }  # fmt: skip
    if family == "minimax-01":
        inner = HEADS * HEAD
        return {
            "attn_qkv.weight": normal(3 * inner, WIDTH, gain=2.0), "attn_gate.weight": normal(inner, WIDTH),
            "attn_norm_2.weight": norm(inner), "attn_output.weight": normal(WIDTH, inner),
        }  # fmt: skip
    return {
        "ssm_in.weight": normal(INNER + convolved + heads, WIDTH, gain=2.0),
        "ssm_conv1d.weight": normal(convolved, TAPS, gain=1.5), "ssm_conv1d.bias": normal(convolved),
        "ssm_dt.bias": steps, "ssm_a": decays[:, None], "ssm_d": norm(heads, 1),
        "ssm_norm.weight": norm(GROUPS, INNER // GROUPS), "ssm_out.weight": normal(WIDTH, INNER),
    }  # fmt: skip


def tiny_hybrid(path, family, **options):
    """Write the file; returns its path."""
    path.write_bytes(build_gguf(*tiny_hybrid_parts(family, **options)))
    return path
