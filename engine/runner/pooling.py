"""From the vectors of a text, which a Runner gives, to its embedding or its scores: plain numpy, float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from engine.cpu.reference import Float32Array, gelu, normalize, softmax
from engine.errors import InvalidRequestError
from engine.gguf.quants import dequantize
from engine.model.config import Pooling, RankConfig
from engine.model.loader import LoadedModel
from engine.model.weights import Linear


class Pooler:
    """What follows the layers of one model.

    Args:
        model: the model; its file stays open.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._config = model.config
        self._weights = model.weights.pooling

    @property
    def default(self) -> Pooling:
        """What the file asks for, else the mean, or the last token's vector where no token sees later ones."""
        return self._config.pooling or (Pooling.LAST if self._config.causal else Pooling.MEAN)

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        last = self._weights.dense_3 or self._weights.dense_2
        return self._config.width if last is None else last.weight.rows

    @property
    def ranks(self) -> bool:
        """Whether there is a classification head."""
        return self._config.rank is not None

    def reads(self, pooling: Pooling) -> Pooling:
        """Which of a text's vectors it is made of: what Runner.vectors is asked for, never RANK.

        Raises:
            InvalidRequestError: RANK of a model without a classification head.
        """
        if pooling is not Pooling.RANK:
            return pooling
        if self._rank.mean:
            return Pooling.MEAN
        return Pooling.LAST if self._config.causal else Pooling.CLS

    def pool(self, texts: Sequence[Float32Array], pooling: Pooling) -> list[Float32Array]:
        """What pooling makes of each text's vectors: all (T, D), or the one (1, D) that reads() names.

        Returns:
            For each text: with NONE vectors (T, width), with RANK scores (labels,), else the embedding (width,).

        Raises:
            InvalidRequestError: RANK of a model without a classification head.
        """
        if pooling is Pooling.NONE:
            return [self._densed(text) for text in texts]
        rows = np.concatenate(texts)
        return list(self._scores(rows) if pooling is Pooling.RANK else self._densed(rows))

    def _densed(self, x: Float32Array) -> Float32Array:
        for matrix in self._dense:
            x = matrix(x)
        return x

    @property
    def _rank(self) -> RankConfig:
        """The classification head."""
        if self._config.rank is None:
            raise InvalidRequestError(
                f"this {self._config.architecture} model has no classification head, so it cannot rank: take the file "
                "of a reranker"
            )
        return self._config.rank

    def _scores(self, x: Float32Array) -> Float32Array:
        """Scores (N, labels) of vectors (N, D); see RankConfig."""
        rank = self._rank
        with np.errstate(over="ignore", invalid="ignore"):  # broken weights give scores that are not finite
            return self._headed(x, rank)

    def _headed(self, x: Float32Array, rank: RankConfig) -> Float32Array:
        cls, output = self._head
        if cls is not None:
            x = cls(x)
            x = gelu(x) if rank.gelu else np.tanh(x)
            if self._weights.cls_norm is not None:
                x = normalize(x, self._weights.cls_norm)
        if output is not None:
            x = output(x)
        if rank.softmax:
            softmax(x)
        return x

    @cached_property
    def _dense(self) -> list[_Matrix]:
        return [_Matrix(linear) for linear in (self._weights.dense_2, self._weights.dense_3) if linear is not None]

    @cached_property
    def _head(self) -> tuple[_Matrix | None, _Matrix | None]:
        cls, output = self._weights.cls, self._weights.cls_output
        return None if cls is None else _Matrix(cls), None if output is None else _Matrix(output)


class _Matrix:
    """A projection as float32: these are few and small beside the layers."""

    def __init__(self, linear: Linear) -> None:
        weight = linear.weight
        self._matrix = dequantize(weight.raw, weight.type).reshape(weight.shape) * np.float32(linear.scale)
        self._bias = linear.bias

    def __call__(self, x: Float32Array) -> Float32Array:
        """The projection of rows x (N, M)."""
        y: Float32Array = x @ self._matrix.T
        return y if self._bias is None else y + self._bias
