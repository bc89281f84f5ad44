"""Latent attention of a layer, from metadata and the names of its tensors."""

from __future__ import annotations

import math

from engine.model.config import LatentConfig, RopeConfig, RopeScaling
from engine.model.reading.metadata import LIMIT
from engine.model.reading.source import Source
from engine.model.rope import yarn_magnitude


def read_latent(source: Source, index: int, *, windowed: bool = False) -> LatentConfig:
    """Widths and ranks of layer `index`; `windowed`: those that the file states for layers with a window."""
    read, prefix = source.read, f"blk.{index}"
    end = "_swa" if windowed else ""
    # Files with one attn_kv_b state widths per head; those with attn_k_b state the widths of what is cached.
    absorbed = f"{prefix}.attn_kv_b.weight" not in source.tensors
    suffix = f"{'_mla' if absorbed else ''}{end}"
    key_width = read.integer(f"attention.key_length{suffix}")
    # Absorbed keys have a matrix for the part that is not rotated; an empty one would be no tensor.
    least = 0 if source.architecture.rope is None else 1
    rope_width = read.integer("rope.dimension_count", low=least, high=key_width - 1 if absorbed else key_width)
    has_query_rank = f"{prefix}.attn_q_a.weight" in source.tensors
    return LatentConfig(
        rank=read.integer(f"attention.kv_lora_rank{end}"),
        q_rank=read.integer("attention.q_lora_rank") if has_query_rank else None,
        nope_width=key_width - rope_width,
        rope_width=rope_width,
        value_width=read.integer(f"attention.value_length{suffix}"),
        absorbed=absorbed,
        key_norm=f"{prefix}.attn_k_norm.weight" in source.tensors,
    )


def latent_sharpening(source: Source, rope: RopeConfig) -> float:
    """Factor on the scores of latent attention: YaRN's cos and sin do not reach the unrotated part of its keys."""
    if rope.scaling is not RopeScaling.YARN:
        return 1.0
    # Files hold a tenth of mscale_all_dim.
    tenth = source.read.number("rope.scaling.yarn_log_multiplier", 0.0, low=0.0, high=LIMIT)
    return (yarn_magnitude(rope) * (1.0 + tenth * math.log(rope.factor))) ** 2
