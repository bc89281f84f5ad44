"""Recurrent mixers of model families, as the declarations in engine/model/architectures/ name them. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Placement(Enum):
    """Which layers have the recurrent mixer; the others have attention."""

    ALL = "all"  # every layer, and none has attention
    WITHOUT_KEYS = "without_keys"  # those whose attention.head_count_kv is 0
    # attention.recurrent_layers says it; without that all but each full_attention_interval-th.
    LISTED = "listed"
    BESIDE_ATTENTION = "beside_attention"  # every layer has both, which read the same input


class Recurrence(Enum):
    """The kind of mixer; all sizes are in the metadata (ssm.*, shortconv.*, kda.*, wkv.*)."""

    SHORT_CONVOLUTION = "short_convolution"  # ShortConvConfig
    MAMBA = "mamba_1"  # MambaConfig
    MAMBA_2 = "mamba_2"  # Mamba2Config
    DELTA_NET = "delta_net"  # DeltaNetConfig
    KIMI_DELTA = "kimi_delta"  # KimiDeltaConfig
    RWKV_6 = "rwkv_6"  # Rwkv6Config
    RWKV_7 = "rwkv_7"  # Rwkv7Config
    LIGHTNING = "lightning"  # LightningConfig
    PLAMO_2 = "plamo_2"  # Plamo2Config


@dataclass(frozen=True)
class RecurrentParts:
    """The recurrent layers of a family.

    Attributes:
        kind: the mixer.
        placement: which layers have it.
        norm_weights: Mamba 1: d, B and C are normalized with ssm_dt_norm, ssm_b_norm and ssm_c_norm.
        grouped_heads: gated delta rules: value heads of one key head follow each other; otherwise they are G apart.
        sigmoid_gate: gated delta rules: see DeltaNetConfig.
        interval: LISTED: default of full_attention_interval.
        decay_floor: Kimi delta attention: kda.gate_lower_bound is read.
        negative_rates: Kimi delta attention with a floor: ssm_a in files has the other sign.
        unit_epsilon: Kimi delta attention: see KimiDeltaConfig.
    """

    kind: Recurrence
    placement: Placement
    norm_weights: bool = False
    grouped_heads: bool = False
    sigmoid_gate: bool = False
    interval: int = 4
    decay_floor: bool = False
    negative_rates: bool = False
    unit_epsilon: float | None = None
