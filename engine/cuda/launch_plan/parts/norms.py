"""Which norms the products that read their result apply themselves. Must not know of layers."""

from __future__ import annotations

from engine.cuda.launch_plan.steps import Norm as Place
from engine.model.config import NormKind
from engine.model.weights import Norm


def folds(norm: Norm | None) -> bool:
    """Whether the kernels of products and attention can apply a norm; others take a row kernel of their own."""
    return norm is not None and norm.kind is NormKind.RMS and norm.weight is not None and norm.bias is None


def norm_of(norm: Norm | None) -> Place:
    """Where a norm is computed."""
    if norm is None:
        return Place.ABSENT
    return Place.FOLDED if folds(norm) else Place.APART
