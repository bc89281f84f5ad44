"""Rotary position embedding of a model's layers, from metadata."""

from __future__ import annotations

import math

from engine.errors import ModelFileError, UnsupportedModelError
from engine.model.architecture import Architecture
from engine.model.config import RopeConfig, RopeScaling, RopeStyle
from engine.model.metadata import LIMIT, HyperParameters
from engine.model.rope import yarn_magnitude


def read_rope(
    architecture: Architecture, read: HyperParameters, width: int, context_length: int, run_context: int
) -> RopeConfig | None:
    """Rotation of the layers without a window of their own; None where the family rotates nothing.

    Args:
        architecture: the family.
        read: metadata.
        width: elements of a head that may be rotated.
        context_length: trained.
        run_context: what the run is to reach; chooses between short and long factors.
    """
    style = _style(architecture, read)
    if style is None:
        return None
    n_rot = read.integer("rope.dimension_count", width, high=width)
    if n_rot % 2:
        raise ModelFileError(
            f"metadata key {architecture.name}.rope.dimension_count is {n_rot}; allowed is an even number"
        )
    _check_sections(architecture, read, n_rot)
    base = _base(architecture, read, "rope.freq_base", architecture.rope_base)
    scaling, factor = _scaling(architecture, read)
    extrapolation = read.number("rope.scaling.yarn_ext_factor", -1.0, high=1.0)
    original_context = read.integer("rope.scaling.original_context_length", 0, low=0) or context_length
    return RopeConfig(
        style=style,
        n_rot=n_rot,
        base=base,
        scaling=scaling,
        factor=factor,
        original_context=original_context,
        extrapolation=1.0 if extrapolation < 0.0 else extrapolation,
        attention_factor=read.number("rope.scaling.attn_factor", 1.0, low=-LIMIT, high=LIMIT),
        beta_fast=_positive(read, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_positive(read, "rope.scaling.yarn_beta_slow", 1.0),
        log_multiplier=_log_multiplier(architecture, read),
        long_factors=architecture.longrope and run_context > original_context,
    )


def windowed_rope(architecture: Architecture, read: HyperParameters, rope: RopeConfig) -> RopeConfig:
    """Rotation of the layers with a window, from that of the others."""
    parts = architecture.window
    assert parts is not None
    default = rope.base if parts.base is None else parts.base
    plain = parts.unscaled
    return RopeConfig(
        style=rope.style,
        n_rot=rope.n_rot,
        base=_base(architecture, read, "rope.freq_base_swa", default),
        scaling=RopeScaling.NONE if plain else rope.scaling,
        factor=1.0 if plain else rope.factor,
        original_context=rope.original_context,
        extrapolation=rope.extrapolation,
        attention_factor=1.0 if plain else rope.attention_factor,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        log_multiplier=rope.log_multiplier,
        long_factors=rope.long_factors,
    )


def _style(architecture: Architecture, read: HyperParameters) -> RopeStyle | None:
    if architecture.rope_sections is not None and any(_sections(read)[:2]):
        return architecture.rope_sections
    return architecture.rope


def _sections(read: HyperParameters) -> tuple[int, ...]:
    if not read.has("rope.dimension_sections"):
        return (0, 0, 0, 0)
    return read.integers("rope.dimension_sections", low=0)


def _check_sections(architecture: Architecture, read: HyperParameters, n_rot: int) -> None:
    """Text has one position on its first three axes, so that sections change nothing while only those are in use."""
    if architecture.rope_sections is None:
        return
    sections = _sections(read)
    if any(sections[:2]) and sum(sections[:3]) < n_rot // 2:
        key = read.spelled("rope.dimension_sections")
        raise UnsupportedModelError(
            f"{architecture.name}.{key} is {list(sections)}, which leaves some of the {n_rot // 2} "
            "rotated pairs to a fourth axis; supported are sections whose first three cover them all"
        )


def _base(architecture: Architecture, read: HyperParameters, key: str, default: float) -> float:
    base = read.number(key, default, high=LIMIT**4)
    if base <= 1.0:
        raise ModelFileError(
            f"metadata key {architecture.name}.{read.spelled(key)} is {base:g}; allowed is a number above 1"
        )
    return base


def _scaling(architecture: Architecture, read: HyperParameters) -> tuple[RopeScaling, float]:
    name = read.text("rope.scaling.type", "linear")
    names = {scaling.value: scaling for scaling in RopeScaling if architecture.longrope or scaling.value != "longrope"}
    if name not in names:
        raise UnsupportedModelError(
            f"{architecture.name}.rope.scaling.type {name!r} is not supported; supported are: {', '.join(names)}"
        )
    # Files write 0 for "no scaling"; scale_linear is the key's older name.
    old_factor = read.number("rope.scale_linear", 0.0, low=0.0, high=LIMIT)
    factor = read.number("rope.scaling.factor", old_factor, low=0.0, high=LIMIT) or 1.0
    if factor < 1.0 / LIMIT:
        raise ModelFileError(
            f"{architecture.name}.rope.scaling.factor is {factor:g}; allowed is 0 or at least {1.0 / LIMIT:g}"
        )
    scaling = names[name]
    if scaling is RopeScaling.LINEAR and factor == 1.0:
        scaling = RopeScaling.NONE
    return scaling, 1.0 if scaling is RopeScaling.NONE else factor


def latent_sharpening(read: HyperParameters, rope: RopeConfig) -> float:
    """Factor on the scores of latent attention: YaRN's cos and sin do not reach the unrotated part of its keys."""
    if rope.scaling is not RopeScaling.YARN:
        return 1.0
    # Files hold a tenth of mscale_all_dim.
    tenth = read.number("rope.scaling.yarn_log_multiplier", 0.0, low=0.0, high=LIMIT)
    return (yarn_magnitude(rope) * (1.0 + tenth * math.log(rope.factor))) ** 2


def _log_multiplier(architecture: Architecture, read: HyperParameters) -> float:
    value = read.number("rope.scaling.yarn_log_multiplier", 0.0, low=0.0, high=LIMIT)
    # Latent attention has mscale equal to mscale_all_dim: cos and sin keep their magnitude whatever it is.
    return 1.0 if architecture.latent and value else value


def _positive(read: HyperParameters, key: str, default: float) -> float:
    """A number above zero; files write 0 or a negative number for "the usual"."""
    value = read.number(key, default, high=LIMIT)
    return value if value > 0.0 else default
