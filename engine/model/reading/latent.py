"""Latent attention of a layer, from metadata and the names of its tensors."""

from __future__ import annotations

import math

from engine.model.config import LatentConfig, RopeConfig, RopeScaling
from engine.model.reading.metadata import LIMIT
from engine.model.reading.source import Source
from engine.model.rope import yarn_magnitude


def read_latent(source: Source, index: int) -> LatentConfig:
    """Widths and ranks of layer `index`."""
    read, prefix = source.read, f"blk.{index}"
    # Files with one attn_kv_b state widths per head; those with attn_k_b state the widths of what is cached.
    absorbed = f"{prefix}.attn_kv_b.weight" not in source.tensors
    suffix = "_mla" if absorbed else ""
    key_width = read.integer(f"attention.key_length{suffix}")
    # Absorbed keys have a matrix for the part that is not rotated; an empty one would be no tensor.
    rope_width = read.integer("rope.dimension_count", high=key_width - 1 if absorbed else key_width)
    has_query_rank = f"{prefix}.attn_q_a.weight" in source.tensors
    return LatentConfig(
        rank=read.integer("attention.kv_lora_rank"),
        q_rank=read.integer("attention.q_lora_rank") if has_query_rank else None,
        nope_width=key_width - rope_width,
        rope_width=rope_width,
        value_width=read.integer(f"attention.value_length{suffix}"),
        absorbed=absorbed,
    )


def latent_sharpening(source: Source, rope: RopeConfig) -> float:
    """Factor on the scores of latent attention: YaRN's cos and sin do not reach the unrotated part of its keys."""
    if rope.scaling is not RopeScaling.YARN:
        return 1.0
    # Files hold a tenth of mscale_all_dim.
    tenth = source.read.number("rope.scaling.yarn_log_multiplier", 0.0, low=0.0, high=LIMIT)
    return (yarn_magnitude(rope) * (1.0 + tenth * math.log(rope.factor))) ** 2
