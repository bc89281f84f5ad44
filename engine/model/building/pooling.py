"""Weights of what follows pooling: classification heads of rerankers and dense layers behind embeddings."""

from __future__ import annotations

from engine.errors import UnsupportedModelError
from engine.model.building.source import TensorSource
from engine.model.parts import Presence
from engine.model.weights import Linear, Norm, PoolingWeights


def build_pooling(source: TensorSource) -> PoolingWeights:
    """The parts that the file has, each as wide as what it reads.

    Raises:
        UnsupportedModelError: a matrix has another shape.
    """
    width, cls, cls_norm, cls_output = source.width, None, None, None
    if source.config.rank is not None:
        cls = _next(source, "cls", width)
        cls_norm = _cls_norm(source)
        cls_output = _next(source, "cls.output", width if cls is None else cls.weight.rows)
    dense_2 = _next(source, "dense_2", width) if source.architecture.dense else None
    dense_3 = None
    if source.architecture.dense:
        dense_3 = _next(source, "dense_3", width if dense_2 is None else dense_2.weight.rows)
    return PoolingWeights(cls=cls, cls_norm=cls_norm, cls_output=cls_output, dense_2=dense_2, dense_3=dense_3)


def _next(source: TensorSource, name: str, columns: int) -> Linear | None:
    """A matrix that reads `columns` numbers and gives as many as it has rows; None where the file lacks it."""
    tensors = source.tensors
    if not tensors.has(f"{name}.weight"):
        return None
    shape = tensors.shape(f"{name}.weight")
    if len(shape) > 2 or shape[-1] != columns:
        raise UnsupportedModelError(f"tensor {name}.weight has shape {shape}; allowed is (rows, {columns})")
    return tensors.linear(name, shape[0] if len(shape) == 2 else 1, columns)


def _cls_norm(source: TensorSource) -> Norm | None:
    if not source.tensors.has("cls.norm.weight"):
        return None
    config = source.config
    shape = source.tensors.shape("cls.norm.weight")
    return source.tensors.norm("cls.norm", shape, config.norm, config.norm_epsilon, weight=True, bias=Presence.OPTIONAL)
