"""Weights of the residual connections of a model, where these are more than sums."""

from __future__ import annotations

from engine.model.building.source import TensorSource
from engine.model.config import NormKind
from engine.model.matrices import Norm
from engine.model.skip_config import BankedSkip, HyperSkip, NormedSkip
from engine.model.skip_weights import BankedSkipWeights, HyperSkipWeights, NormedSkipWeights, SkipWeights


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
    return None


def build_head_skip(source: TensorSource) -> SkipWeights | None:
    """Of the head; None where it reads the one stream as it is."""
    skip = source.config.skip
    if isinstance(skip, BankedSkip):
        return _banked(source, "output_res_score")
    if isinstance(skip, HyperSkip):
        return _hyper(source, "output_hc", skip, inject=False)
    return None


def _banked(source: TensorSource, name: str, *, banks: bool = False) -> BankedSkipWeights:
    weight = source.tensors.vector(f"{name}.weight", (source.width,))
    return BankedSkipWeights(Norm(NormKind.RMS, source.config.norm_epsilon, weight), banks)


def _hyper(source: TensorSource, name: str, skip: HyperSkip, *, inject: bool) -> HyperSkipWeights:
    count, wide = skip.count, skip.count * source.width
    return HyperSkipWeights(
        norm=source.norm(f"{name}_norm", (count, source.width)),
        down=source.linear(f"{name}_down", skip.rank, wide),
        up=source.linear(f"{name}_up", wide, skip.rank),
        inject=source.linear(f"{name}_inject", count, wide) if inject else None,
    )
