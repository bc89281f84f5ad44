"""Refuses metadata that would change what a model computes and that nobody understood."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import UnsupportedModelError
from engine.model.architecture import Architecture
from engine.model.config import AttentionConfig, ModelConfig
from engine.model.metadata import HyperParameters

HARMLESS = frozenset(
    {
        "vocab_size",  # token_embd has the rows it has
        "tensor_data_layout",
        "pooling_type",
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
        "classifier.output_labels",
        "n_deepstack_layers",  # pictures only
    }
)
"""Keys that change nothing where the family does not read them."""

ZERO_MATTERS = frozenset({"attention.causal"})
"""Keys whose false or zero says something."""

OTHER_SENSES = ("vision.", "audio.", "mm.")
"""Beginnings of keys that are about pictures and sound."""

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
    "attention.causal": (True,),
    "activation.situ_beta": (1.0,),
    "attention.indexer.kpool_select_tail": (True,),
}
"""Values that writers put down as defaults whether or not a family reads the key."""


def check_unread(architecture: Architecture, read: HyperParameters, config: ModelConfig) -> None:
    """Refuse a file with a key of this family that was not read, unless it says nothing.

    Raises:
        UnsupportedModelError: names the key and its value.
    """
    same = _same_in_windows(config)
    for key, value in read.unread().items():
        if key in HARMLESS or key in architecture.ignored_keys or key.startswith(OTHER_SENSES):
            continue
        if (_says_nothing(value) and key not in ZERO_MATTERS) or _is_any(value, USUAL.get(key, ())):
            continue
        if key in same and (_is_any(value, (same[key],)) or not _has_windows(config)):
            continue
        if key == "rope.freq_base_swa" and not _has_windows(config):
            continue
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        raise UnsupportedModelError(
            f"metadata key {architecture.name}.{key} is {shown}, which architecture {architecture.name!r} is not known "
            "to use here; running without it could give wrong results"
        )


def _same_in_windows(config: ModelConfig) -> dict[str, int]:
    """Keys about windowed layers that may repeat what holds for all layers."""
    attention = next((layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig)), None)
    return {
        "rope.dimension_count_swa": 0 if attention is None or attention.rope is None else attention.rope.n_rot,
        "attention.key_length_swa": 0 if attention is None else attention.key_width,
        "attention.value_length_swa": 0 if attention is None else attention.value_width,
    }


def _has_windows(config: ModelConfig) -> bool:
    return any(isinstance(layer.mixer, AttentionConfig) and layer.mixer.window for layer in config.layers)


def _is_any(value: object, usual: tuple[Any, ...]) -> bool:
    return not isinstance(value, (list, tuple, np.ndarray)) and value in usual


def _says_nothing(value: object) -> bool:
    """Zero, false, minus one, no limit, or a list of nothing else: what writers put for "not used"."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return all(_says_nothing(item) for item in value)
    if isinstance(value, (bool, np.bool_, int, np.integer)):
        return int(value) in (0, -1)
    if isinstance(value, (float, np.floating)):
        return value == 0.0 or value == -np.inf
    return value == ""
