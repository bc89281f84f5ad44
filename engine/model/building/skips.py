"""Weights of the residual connections of a model, where these are more than sums."""

from __future__ import annotations

import numpy as np

from engine.model.building.source import TensorSource
from engine.model.config import BankedSkip, GatedSkip, HyperSkip, MixedSkip, NormedSkip, NormKind, StackSkip
from engine.model.weights import (
    BankedSkipWeights,
    GatedSkipWeights,
    HyperSkipWeights,
    MeanSkipWeights,
    MixedSkipWeights,
    Norm,
    NormedSkipWeights,
    SkipWeights,
    StackSkipWeights,
)


def build_part_skip(source: TensorSource, index: int, part: str, norm_names: tuple[str, ...]) -> SkipWeights | None:
    """Of one part of layer `index`; None where its result is added to what it read.

    Args:
        source: the tensors.
        index: number of the layer.
        part: "attn" or "ffn".
        norm_names: names of the norm before the part.
    """
    skip, prefix = source.config.skip, f"blk.{index}"
    if isinstance(skip, NormedSkip):
        norm = source.first_norm(prefix, norm_names)
        assert norm is not None
        return NormedSkipWeights(norm)
    if isinstance(skip, BankedSkip):
        return _banked(source, f"{prefix}.{part}_res_score", banks=part == "attn" and index % skip.block == 0)
    if isinstance(skip, HyperSkip):
        return _hyper(source, f"{prefix}.hc_{part}", skip, inject=True)
    if isinstance(skip, GatedSkip):
        return _gated(source, f"{prefix}.hc_{part}", skip, parts=2)
    if isinstance(skip, MixedSkip):
        return _mixed(source, f"{prefix}.hc_{part}", skip)
    if isinstance(skip, StackSkip):
        begins, ends = part == "attn" and index % skip.layers == 0, part == "ffn" and (index + 1) % skip.layers == 0
        return StackSkipWeights(_bare_norm(source), begins=begins, ends=ends, high=skip.is_high(index))
    return None


def build_head_skip(source: TensorSource) -> SkipWeights | None:
    """Of the head; None where it reads the one stream as it is."""
    skip = source.config.skip
    if isinstance(skip, BankedSkip):
        return _banked(source, "output_res_score")
    if isinstance(skip, HyperSkip):
        return _hyper(source, "output_hc", skip, inject=False)
    if isinstance(skip, GatedSkip):
        return _gated(source, "output_hc", skip, parts=1)
    if isinstance(skip, MixedSkip):
        return _gated(source, "output_hc", skip, parts=1) if skip.weighted_head else MeanSkipWeights()
    if isinstance(skip, StackSkip):
        return StackSkipWeights(_bare_norm(source), init=source.tensors.vector("hrm.z_l_init", (source.width,)))
    return None


def _bare_norm(source: TensorSource) -> Norm:
    return Norm(source.config.norm, source.config.norm_epsilon, None)


def _banked(source: TensorSource, name: str, *, banks: bool = False) -> BankedSkipWeights:
    weight = source.tensors.vector(f"{name}.weight", (source.width,))
    return BankedSkipWeights(Norm(NormKind.RMS, source.config.norm_epsilon, weight), banks)


def _gated(source: TensorSource, name: str, skip: GatedSkip | MixedSkip, *, parts: int) -> GatedSkipWeights:
    rows, tensors = parts * skip.count, source.tensors
    return GatedSkipWeights(
        norm=Norm(NormKind.RMS, source.config.norm_epsilon, None),
        fn=source.linear(f"{name}_fn", rows, skip.count * source.width),
        factor=np.repeat(tensors.vector(f"{name}_scale.weight", (parts,)), skip.count),
        base=tensors.vector(f"{name}_base.weight", (rows,)),
    )


def _mixed(source: TensorSource, name: str, skip: MixedSkip) -> MixedSkipWeights:
    count, tensors = skip.count, source.tensors
    rows = (2 + count) * count
    return MixedSkipWeights(
        norm=_bare_norm(source),
        fn=source.linear(f"{name}_fn", rows, count * source.width),
        factor=np.repeat(tensors.vector(f"{name}_scale.weight", (3,)), (count, count, count * count)),
        base=tensors.vector(f"{name}_base.weight", (rows,)),
    )


def _hyper(source: TensorSource, name: str, skip: HyperSkip, *, inject: bool) -> HyperSkipWeights:
    count, wide = skip.count, skip.count * source.width
    return HyperSkipWeights(
        norm=source.norm(f"{name}_norm", (count, source.width)),
        down=source.linear(f"{name}_down", skip.rank, wide),
        up=source.linear(f"{name}_up", wide, skip.rank),
        inject=source.linear(f"{name}_inject", count, wide) if inject else None,
    )
