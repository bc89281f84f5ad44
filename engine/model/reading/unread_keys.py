"""Sorts the metadata that a family did not read: without effect, unknown, or known to change what a model computes.

The last is refused; unknown keys are returned, for a warning.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import UnsupportedModelError
from engine.model.architecture import Architecture
from engine.model.config import ModelConfig
from engine.model.reading.metadata import HyperParameters, usual_name

HARMLESS = frozenset(
    {
        "vocab_size",  # the rows of token_embd count
        "tensor_data_layout",
        "pooling_type",  # every family reads it
        "decoder_start_token_id",
        "feed_forward_length",
        "expert_count",
        "expert_used_count",
        "expert_shared_count",
        "expert_feed_forward_length",
        "expert_weights_norm",
        "attention.temperature_length",
        "expert_group_scale",  # only beside expert groups of a kind that no family here has
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window_pattern",  # without a window
        "use_parallel_residual",
        "router_logit_softcapping",
        "attention.rope_pattern",
        "token_shift_count",
        "classifier.output_labels",  # without a classification head
        "classifier.pooling_type",
        "n_deepstack_layers",  # pictures only
    }
)
"""Keys that change nothing where the family does not read them."""

ZERO_MATTERS = frozenset({"attention.causal"})
"""Keys that matter also where they are false or zero."""

OTHER_SENSES = ("vision.", "audio.", "mm.")
"""Beginnings of keys about pictures and sound."""

USUAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (50.0,),
    "final_logit_softcapping": (30.0,),
    "logit_scale": (1.0,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
    "expert_weights_scale": (1.0,),
    "expert_group_count": (1,),
    "expert_group_used_count": (1,),
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.factor": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.mscale": (1.0,),
    "rope.freq_scale": (1.0,),
    "rope.scale_linear": (1.0,),
    "interleave_moe_layer_step": (1,),
    "attention.causal": (True,),
    "activation.situ_beta": (1.0,),
    "attention.indexer.kpool_select_tail": (True,),
}
"""Values that writers store as defaults whether or not a family reads the key."""


MATTERS = frozenset(
    {
        "activation_sparsity_scale",
        "attention.causal",
        "attention.chunk_size",
        "attention.clamp_kqv",
        "attention.compress_ratios",
        "attention.compress_rope_freq_base",
        "attention.decay_lora_rank",
        "attention.gate_lora_rank",
        "attention.group_norm_epsilon",
        "attention.group_norm_groups",
        "attention.iclr_lora_rank",
        "attention.key_length_mla",
        "attention.key_length_mla_swa",
        "attention.key_length_swa",
        "attention.kv_lora_rank",
        "attention.kv_lora_rank_swa",
        "attention.layer_types",
        "attention.max_alibi_bias",
        "attention.output_group_count",
        "attention.output_lora_rank",
        "attention.output_scale",
        "attention.q_lora_rank",
        "attention.recurrent_layers",
        "attention.relative_buckets_count",
        "attention.scale",
        "attention.shared_kv_layers",
        "attention.sliding_window",
        "attention.temperature_scale",
        "attention.use_qk_norm",
        "attention.value_length_mla",
        "attention.value_length_mla_swa",
        "attention.value_length_swa",
        "attention.value_residual_mix_lora_rank",
        "attention.value_scale",
        "attn_logit_softcapping",
        "block_size",
        "conv_group_size",
        "conv_kernel_size",
        "decoder_block_count",
        "embedding_length_out",
        "embedding_length_per_layer_input",
        "embedding_scale",
        "experts_per_group",
        "features_length",
        "final_logit_softcapping",
        "full_attention_interval",
        "hash_layer_count",
        "hidden_activation",
        "interleave_moe_layer_step",
        "leading_dense_block_count",
        "logit_scale",
        "moe_every_n_layers",
        "moe_latent_size",
        "nextn_predict_layers",
        "norm_before_fc",
        "norm_before_residual",
        "num_loops",
        "rescale_every_n_layers",
        "residual_scale",
        "rope.dimension_count_swa",
        "rope.dimension_sections",
        "rope.freq_base_swa",
        "rope.freq_scale",
        "rope.scale_linear",
        "selector_rank",
        "selector_top_k",
        "skip_loop_final_norm",
        "swiglu_clamp_exp",
        "swiglu_clamp_shexp",
        "swin_norm",
        "target_hidden_size",
        "target_layers",
        "time_decay_extra_dim",
        "time_mix_extra_dim",
    }
)
"""Keys that change what is computed, in llama.cpp's families or in files that Ollama's converters make."""

MATTER_WITHIN = (
    "activation.",
    "adapters.",
    "altup.",
    "attention.indexer.",
    "attn_res.",
    "convnext.",
    "dense_2_",
    "dense_3_",
    "expert_",
    "hrm.",
    "hyper_connection.",
    "kda.",
    "ple.",
    "posnet.",
    "rope.scaling.",
    "shortconv.",
    "ssm.",
    "wkv.",
)
"""Beginnings of further keys of that kind."""


def check_unread(
    architecture: Architecture, read: HyperParameters, config: ModelConfig, *, strict: bool = False
) -> tuple[str, ...]:
    """Look through the keys of this family that were not read.

    Args:
        architecture: the family.
        read: its keys, and which of them were read.
        config: what was made of them.
        strict: refuse unknown keys too.

    Returns:
        Whole names of the unknown keys.

    Raises:
        UnsupportedModelError: a key is known to change the computation; names the key and its value.
    """
    unknown = []
    for name, value in read.unread().items():
        key = usual_name(name)
        shadowed = key != name and read.has(key) and read.spelled(key) == key
        if not shadowed and _without_effect(architecture, config, key, value):
            continue
        if strict or (not shadowed and (key in MATTERS or key.startswith(MATTER_WITHIN))):
            shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
            raise UnsupportedModelError(
                f"metadata key {architecture.name}.{name} is {shown}, which architecture {architecture.name!r} is not "
                "known to use here; running without it could give wrong results"
            )
        unknown.append(f"{architecture.name}.{name}")
    return tuple(unknown)


def _without_effect(architecture: Architecture, config: ModelConfig, key: str, value: object) -> bool:
    """Whether the computation is complete without a key that was not read."""
    same = _same_in_windows(config)
    if key in HARMLESS or key in architecture.ignored_keys or key.startswith(OTHER_SENSES):
        return True
    if (_says_nothing(value) and key not in ZERO_MATTERS) or _is_any(value, USUAL.get(key, ())):
        return True
    if key in same and (_is_any(value, (same[key],)) or not _has_windows(config)):
        return True
    return key == "rope.freq_base_swa" and not _has_windows(config)


def _same_in_windows(config: ModelConfig) -> dict[str, int]:
    """Keys about windowed layers that may repeat what holds for all layers."""
    attentions = [layer.attention_part for layer in config.layers if layer.attention_part is not None]
    ropes = [attention.rope for attention in attentions if attention.rope is not None]
    return {
        "rope.dimension_count_swa": ropes[0].n_rot if ropes else 0,
        "attention.key_length_swa": attentions[0].key_width if attentions else 0,
        "attention.value_length_swa": attentions[0].value_width if attentions else 0,
    }


def _has_windows(config: ModelConfig) -> bool:
    attentions = (layer.attention_part for layer in config.layers)
    return any(attention is not None and (attention.window or attention.chunk) for attention in attentions)


def _is_any(value: object, usual: tuple[Any, ...]) -> bool:
    return not isinstance(value, (list, tuple, np.ndarray)) and value in usual


def _says_nothing(value: object) -> bool:
    """Zero, false, minus one, no limit, or a list of nothing else: what writers store for "not used"."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return all(_says_nothing(item) for item in value)
    if isinstance(value, (bool, np.bool_, int, np.integer)):
        return int(value) in (0, -1)
    if isinstance(value, (float, np.floating)):
        return value == 0.0 or value == -np.inf
    return value == ""
