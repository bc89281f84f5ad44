"""Rotary position embedding of a model's layers, from metadata."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import ModelFileError, UnsupportedModelError
from engine.model.config import RopeConfig, RopeScaling, RopeStyle
from engine.model.parts import RopeParts, WindowParts
from engine.model.reading.metadata import LIMIT, HyperParameters
from engine.model.reading.source import Source


def read_layer_rope(source: Source, index: int, width: int, windows: list[int | None]) -> RopeConfig | None:
    """Rotation of layer `index`; None where it rotates nothing.

    Args:
        source: the file.
        index: number of the layer.
        width: elements of a head that may be rotated.
        windows: the window of each layer.

    Raises:
        ModelFileError, UnsupportedModelError: a key has a value that is impossible or not supported.
    """
    parts, attention = source.architecture.rope, source.architecture.attention
    if parts is None or parts.n_layers not in (None, source.n_layers):
        return None
    window = None if attention is None else attention.window
    if _is_skipped(source, parts, window, index, windows) or (parts.pattern and not _in_pattern(source, index)):
        return None
    # Granite says with this key whether it rotates at all.
    if parts.switch and not source.read.flag("rope.scaling.finetuned", True):
        return None
    if window is None or windows[index] is None:
        rope = _rope(source, parts, width, "rope.dimension_count")
        return replace(rope, n_rot=rope.n_rot // 4 * 2) if parts.halved else rope
    own = window.own_width and source.read.has("rope.dimension_count_swa")
    count = "rope.dimension_count_swa" if own else "rope.dimension_count"
    return _windowed(source, window, _rope(source, parts, width, count))


def _is_skipped(
    source: Source, parts: RopeParts, window: WindowParts | None, index: int, windows: list[int | None]
) -> bool:
    """Whether layer `index` does not rotate because of its place or its lack of a window."""
    if window is not None and not any(windows):
        return False
    if parts.skip_every is not None:
        return index % parts.skip_every == (0 if parts.skip_first else parts.skip_every - 1)
    if window is None or not window.rotated_only or windows[index] is not None:
        return False
    lead = source.read.integer("leading_dense_block_count", 0, low=0) if parts.dense_lead else 0
    return index >= lead


def _in_pattern(source: Source, index: int) -> bool:
    """What attention.rope_pattern says of a layer; without a list all rotate."""
    key = "attention.rope_pattern"
    if not source.read.is_list(key):
        return True
    pattern = source.read.flags(key)
    if len(pattern) < source.n_layers:
        raise ModelFileError(
            f"metadata key {source.name}.{key} holds {len(pattern)} values; "
            f"allowed are {source.n_layers}, one per layer"
        )
    return pattern[index]


def _rope(source: Source, parts: RopeParts, width: int, count: str) -> RopeConfig:
    """Rotation of the layers without a window of their own; `count` is the key with the number of rotated elements."""
    read = source.read
    n_rot = _n_rot(source, count, width, width)
    style = _style(source, parts, n_rot)
    scaling, factor = _scaling(source, parts)
    extrapolation = read.number("rope.scaling.yarn_ext_factor", -1.0, high=1.0)
    original_context = read.integer("rope.scaling.original_context_length", 0, low=0) or source.context_length
    return RopeConfig(
        style=style,
        n_rot=n_rot,
        base=_base(source, "rope.freq_base", parts.base),
        scaling=scaling,
        factor=factor,
        original_context=original_context,
        extrapolation=1.0 if extrapolation < 0.0 else extrapolation,
        attention_factor=read.number("rope.scaling.attn_factor", 1.0, low=-LIMIT, high=LIMIT),
        beta_fast=_positive(read, "rope.scaling.yarn_beta_fast", parts.beta_fast),
        beta_slow=_positive(read, "rope.scaling.yarn_beta_slow", 1.0),
        log_multiplier=_log_multiplier(source),
        long_factors=parts.long_factors and source.run_context > original_context,
    )


def _n_rot(source: Source, key: str, default: int, width: int) -> int:
    n_rot = source.read.integer(key, default, high=width)
    if n_rot % 2:
        raise ModelFileError(f"metadata key {source.name}.{key} is {n_rot}; allowed is an even number")
    return n_rot


def _windowed(source: Source, window: WindowParts, rope: RopeConfig) -> RopeConfig:
    """Rotation of the layers with a window, from that of the others."""
    base = _base(source, "rope.freq_base_swa", rope.base if window.base is None else window.base)
    rope = replace(rope, base=base, divided=not window.undivided)
    if not window.unscaled:
        return rope
    return replace(rope, scaling=RopeScaling.NONE, factor=1.0, attention_factor=1.0)


def _style(source: Source, parts: RopeParts, n_rot: int) -> RopeStyle:
    """The pairing, by whether the file divides frequencies among axes of position.

    A text's position is the same on the first three axes, so sections change nothing else while only those are used.
    """
    key = "rope.dimension_sections"
    if parts.sections is None or not source.read.has(key):
        return parts.style
    sections = source.read.integers(key, low=0)
    if not any(sections[:2]):
        return parts.style
    if sum(sections[:3]) < n_rot // 2:
        raise UnsupportedModelError(
            f"{source.name}.{source.read.spelled(key)} is {list(sections)}, which leaves some of the {n_rot // 2} "
            "rotated pairs to a fourth axis; supported are sections whose first three cover them all"
        )
    return parts.sections


def _base(source: Source, key: str, default: float) -> float:
    base = source.read.number(key, default, high=LIMIT**4)
    if base <= 1.0:
        raise ModelFileError(
            f"metadata key {source.name}.{source.read.spelled(key)} is {base:g}; allowed is a number above 1"
        )
    return base


def _scaling(source: Source, parts: RopeParts) -> tuple[RopeScaling, float]:
    read = source.read
    name = read.text("rope.scaling.type", "linear")
    names = {scaling.value: scaling for scaling in RopeScaling if parts.long_factors or scaling.value != "longrope"}
    if name not in names:
        raise UnsupportedModelError(
            f"{source.name}.rope.scaling.type {name!r} is not supported; supported are: {', '.join(names)}"
        )
    # Files write 0 for "no scaling"; scale_linear is the key's older name.
    old_factor = read.number("rope.scale_linear", 0.0, low=0.0, high=LIMIT)
    factor = read.number("rope.scaling.factor", old_factor, low=0.0, high=LIMIT) or 1.0
    if factor < 1.0 / LIMIT:
        raise ModelFileError(
            f"{source.name}.rope.scaling.factor is {factor:g}; allowed is 0 or at least {1.0 / LIMIT:g}"
        )
    scaling = names[name]
    if scaling is RopeScaling.LINEAR and factor == 1.0:
        scaling = RopeScaling.NONE
    return scaling, 1.0 if scaling is RopeScaling.NONE else factor


def _log_multiplier(source: Source) -> float:
    value = source.read.number("rope.scaling.yarn_log_multiplier", 0.0, low=0.0, high=LIMIT)
    attention = source.architecture.attention
    # Latent attention has mscale equal to mscale_all_dim: cos and sin keep their magnitude whatever it is.
    return 1.0 if attention is not None and attention.latent and value else value


def _positive(read: HyperParameters, key: str, default: float) -> float:
    """A number above zero; files store 0 or a negative number for the default."""
    value = read.number(key, default, high=LIMIT)
    return value if value > 0.0 else default
